"""docs/backends.md is up to date: each device's options, and the driver that its CUDA needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rlcore_backends.cuda.doctor import CudaDoctor

from rlcore import registry
from rlcore.diagnose import host

PAGE = (Path(__file__).parents[1] / "docs" / "backends.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_every_option_of_a_device_is_on_the_page_with_its_default(name):
    table = re.search(rf"^\| {name} \| default \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    assert table
    said = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table[0], re.MULTILINE))
    fields = registry.load("backends", name).Options.model_fields
    assert said == {option: "unset" if field.default is None else str(field.default) for option, field in fields.items()}


def test_the_oldest_driver_is_that_of_the_cuda_which_the_stack_brings():
    """docs.nvidia.com/deploy/cuda-compatibility: CUDA 12.x from driver 525 on, 13.x from 580."""
    runtime = host.read_pins(CudaDoctor.pins)["nvidia-cuda-runtime"]
    assert str(runtime.specifier).startswith("==13.") and CudaDoctor.versions["NVIDIA driver"] == ">=580"
    assert "libraries of CUDA 13" in PAGE and "580 is the oldest" in PAGE
