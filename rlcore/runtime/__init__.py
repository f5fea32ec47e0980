"""Workers and where they run: roles, pools, device memory, liveness."""
