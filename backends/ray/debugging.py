"""Ray's distributed debugger: settings that let `breakpoint()` in a worker wait for a client (docs/debugging.md).

Read from ray 2.60, ray/util/debugpy.py. A worker that hits `breakpoint()` listens on a free port of its node, writes the port
under its worker id into the cluster's store, prints the address on its stderr, and waits. With RAY_DEBUG_POST_MORTEM=1 so does
one whose method raises. The dashboard is needed only to list the waiting workers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from rlcore.errors import PluginError

CHOICES = ("RAY_DEBUG", "RAY_DEBUG_POST_MORTEM")
CONTROLLER = {"RAY_DEDUP_LOGS_ALLOW_REGEX": "debugger is listening on"}
"""For the controller, before it imports ray: without it Ray shows the address of the first waiting worker only."""


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Debugger variables for the workers, from `given`, the controller's environment.

    They are sent with the job: a node that was started earlier has its own environment.
    """
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # silences a warning about standard-library files
    return quiet | {name: given[name] for name in CHOICES if name in given}


def check(given: Mapping[str, str]) -> None:
    """PluginError when the debugger is requested but debugpy is missing: workers would not wait, and the run would go on."""
    asked = [name for name in CHOICES if given.get(name) == "1"]
    if asked and importlib.util.find_spec("debugpy") is None:
        command = "pip install -r requirements/ray.txt"
        raise PluginError(f"{asked[0]}=1: debugpy is not installed; on every node {command}")
