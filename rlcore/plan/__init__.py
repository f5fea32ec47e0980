"""What a run will need, before it starts: its batches, and its memory by part and phase."""
