"""Where `placement.kind: ray` begins: what Ray reads when it is imported must stand before that."""

from __future__ import annotations

import importlib.util
import os

from rlcore.errors import PluginError
from rlcore.placement import Placement
from rlcore.watch import Watch
from rlcore.worker import Policy

from . import ray_debugging


def open_pools(policy: Policy, watch: Watch) -> Placement:
    """What ray_placement opens. PluginError where Ray, or the debugger that is asked for, is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise PluginError("placement.kind: ray is not installed; on every node, pip install -r requirements/ray.txt")
    ray_debugging.check(os.environ)
    for name, value in ray_debugging.CONTROLLER.items():
        os.environ.setdefault(name, value)
    from .ray_placement import open_pools

    return open_pools(policy, watch)
