"""Entry point of `placement.kind: ray`: sets what Ray reads from the environment before it is imported."""

from __future__ import annotations

import importlib.util
import os

from rlcore.errors import PluginError
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.placement import Placement
from rlcore.runtime.watchdog import Watchdog

from . import debugging


def open_pools(resolved: ResolvedModel, watchdog: Watchdog) -> Placement:
    """Call `pools.open_pools`. PluginError where Ray, or the requested debugger, is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise PluginError("placement.kind: ray is not installed; on every node, pip install -r requirements/ray.txt")
    debugging.check(os.environ)
    for name, value in debugging.CONTROLLER.items():
        os.environ.setdefault(name, value)
    from .pools import open_pools

    return open_pools(resolved, watchdog)
