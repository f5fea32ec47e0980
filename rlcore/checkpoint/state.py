"""Random states of processes and devices."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from rlcore.distributed.snapshot import Snapshot


def random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, as JSON values."""
    state = numpy.random.get_state(legacy=True)
    assert isinstance(state, tuple), "the legacy form"
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }


def seed_random_states(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, for code without a seed of its own: a user's reward, dropout."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(_bytes(states["torch"]))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def save_generator(device: torch.device, snapshot: Snapshot) -> None:
    """Add the device's random state, if it has one. First rank only: all ranks start from one seed and draw alike."""
    states = torch.get_device_module(device)
    if hasattr(states, "get_rng_state"):
        state = {"device": device.type, "state": _hex(states.get_rng_state(device))}
        snapshot.text("generator.json", json.dumps(state))


def load_generator(device: torch.device, folder: Path) -> None:
    """Restore what `save_generator` wrote on a device of this type; the state of another type is ignored."""
    path = folder / "generator.json"
    if path.exists() and (saved := json.loads(path.read_text(encoding="utf-8")))["device"] == device.type:
        torch.get_device_module(device).set_rng_state(_bytes(saved["state"]), device)
