"""The models under training: loaded, packed into rows, run, and optimized."""
