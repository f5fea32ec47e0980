"""Weight formats, one module each, and the tables between their names and the hub's."""
