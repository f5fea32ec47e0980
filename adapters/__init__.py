"""Model families, data sets and formats; found by entry point, never imported by name."""
