"""Calls of `torch.cuda` by device-independent code fail immediately: on a machine without such a device most of them do
nothing and would go unnoticed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

GUARDED = {"rlcore", "rlcore_adapters"}
_PARTS = ("", ".memory", ".random", ".nvtx", ".amp", ".graphs")


def arm() -> None:
    """Guard torch.cuda for the rest of this process; packages not in GUARDED may still call it."""
    for part in _PARTS:
        module = sys.modules.get(f"torch.cuda{part}")
        for name, function in list(vars(module).items()) if module else ():
            if isinstance(function, types.FunctionType) and not name.startswith("__"):
                setattr(module, name, _guarded(function, f"torch.cuda{part}.{name}()"))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = _guarded(owner.cuda, f"{owner.__name__}.cuda()")
    torch.Tensor.is_cuda = property(_guarded(torch.Tensor.is_cuda.__get__, "Tensor.is_cuda"))


def _guarded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        assert caller.partition(".")[0] not in GUARDED, f"{caller} calls {name}; ask torch.get_device_module(device)"
        return function(*arguments, **options)

    return guarded
