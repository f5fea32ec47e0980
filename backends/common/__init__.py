"""Code shared by several backends."""
