"""`rlcore check`: what every backend must do, as measurements with limits. The contract of a plugin.

Each module is a section: it runs in a process of its own on the device and yields measurements. `goldens.json` holds what the
two small models of `case` give in float64 on a processor (ci/goldens.py computes it, from transformers' own forward pass).
"""
