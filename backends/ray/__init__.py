"""Ray placements: pools of worker processes."""
