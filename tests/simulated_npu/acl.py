"""The part of Ascend's runtime that Ray calls to detect a node's devices."""

import os
from types import SimpleNamespace


def get_soc_name() -> str:
    return "simulated"


rt = SimpleNamespace(get_device_count=lambda: (int(os.environ.get("SIMULATED_NPUS", "1")), 0))
