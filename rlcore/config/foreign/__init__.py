"""Run files of other frameworks, read and turned into ours: what `rlcore import-config` does. Imports nothing heavy."""
