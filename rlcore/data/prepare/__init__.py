"""`rlcore data`: published data sets as training files."""
