"""Data files, local or on a hub, as sequences of records."""
