"""The run file: its settings, what they may be, and how they are read. Imports nothing heavy."""
