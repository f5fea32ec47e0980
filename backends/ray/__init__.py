"""Ray placements: pools of workers in processes of their own."""
