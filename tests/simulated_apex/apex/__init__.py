"""The part of NVIDIA apex that rlcore calls, in plain Python: signatures and state as in its repository."""
