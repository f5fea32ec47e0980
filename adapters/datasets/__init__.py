"""Data sets as `rlcore.types.Row`: published ones and generated ones."""
