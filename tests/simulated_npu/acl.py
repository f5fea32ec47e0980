"""Of Ascend's runtime, what Ray asks to learn of the devices of a node."""

import os
from types import SimpleNamespace


def get_soc_name() -> str:
    return "simulated"


rt = SimpleNamespace(get_device_count=lambda: (int(os.environ.get("SIMULATED_NPUS", "1")), 0))
