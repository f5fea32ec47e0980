"""The run file: its settings, their validation and their loading. Imports nothing heavy."""
