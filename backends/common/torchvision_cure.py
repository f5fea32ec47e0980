"""Importing torchvision on a torch without the device that torchvision was built for."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

_cure: list[Any] = []  # torch.library.Library undefines its operators when collected: held for the life of the process


def cure_torchvision() -> None:
    """Lets `import torchvision` succeed on CPU torch. Does nothing where torchvision is absent or its operators load.

    Why: PyPI's torchvision is built for CUDA. On CPU torch its operator library does not load, and the import dies with
        "operator torchvision::nms does not exist", taking transformers' and vLLM's image processors with it.
    How: declare the two operators that the import describes to torch; their kernels stay absent, and nothing here calls them.
    Upstream: https://github.com/pytorch/vision/issues (the import should not need operators that did not load).
    Delete when: pip's torchvision imports on CPU torch, or requirements/cpu.txt can name PyTorch's CPU index everywhere.
    """
    if _cure or importlib.util.find_spec("torchvision") is None or _operators_load():
        return
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _cure.append(library)


def _operators_load() -> bool:
    """Whether torchvision's compiled operators are, or can be, registered; loading them is what its import does first."""
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None, "a package, which the caller has found"
    folder = os.path.dirname(spec.origin)
    libraries = [entry.path for entry in os.scandir(folder) if entry.name.startswith("_C.") or entry.name == "_C.so"]
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
