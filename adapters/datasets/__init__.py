"""Published rows, or generated ones, as our rows."""
