"""The launcher: forms one Ray cluster from several nodes."""
