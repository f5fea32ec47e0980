"""What rlcore calls of NVIDIA's apex, in plain Python: signatures and state as in its repository."""
