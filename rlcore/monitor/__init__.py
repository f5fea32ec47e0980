"""What a run measures and says: clock, metrics, console, files."""
