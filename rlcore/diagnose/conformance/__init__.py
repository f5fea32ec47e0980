"""`rlcore check`: the contract of a backend plugin, as measurements with limits.

Each module is a section: it runs in a process of its own on the device and yields measurements. `goldens.json` holds the
float64 results on a CPU of the two small models of `case` (ci/goldens.py computes them, from transformers' own forward pass).
"""
