"""Weights of models in any format, read and written one tensor at a time (docs/conversion.md)."""
