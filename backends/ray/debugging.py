"""Ray's distributed debugger: what lets `breakpoint()` in a worker wait for somebody (docs/debugging.md).

Read from ray 2.60, ray/util/debugpy.py. A worker that meets `breakpoint()` listens on a free port of its node, writes the port
beside its worker id into the cluster's store, says the address on its stderr, and waits. With RAY_DEBUG_POST_MORTEM=1 so does
one whose method raises. Nothing of it needs the dashboard, except to list who waits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from rlcore.errors import PluginError

CHOICES = ("RAY_DEBUG", "RAY_DEBUG_POST_MORTEM")
CONTROLLER = {"RAY_DEDUP_LOGS_ALLOW_REGEX": "debugger is listening on"}
"""For the controller, before it imports ray: without it only the first of several waiting workers says its address."""


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Variables for the workers, out of those that `given`, the controller's environment, chooses the debugger by.

    They travel with the job: a node that was started before has an environment of its own.
    """
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # a warning that is about files of the standard library
    return quiet | {name: given[name] for name in CHOICES if name in given}


def check(given: Mapping[str, str]) -> None:
    """PluginError where the debugger is asked for and cannot come: nobody would wait, and the run would go on."""
    asked = [name for name in CHOICES if given.get(name) == "1"]
    if asked and importlib.util.find_spec("debugpy") is None:
        command = "pip install -r requirements/ray.txt"
        raise PluginError(f"{asked[0]}=1: debugpy is not installed; on every node {command}")
