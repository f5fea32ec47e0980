"""The cpu backend: sharing cores between workers, engine and collective settings, and its own layers."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch
from rlcore_backends.cpu import operators

from rlcore import registry
from rlcore.diagnose.conformance.operators import HOST, LIMITS, distances, noise

CPU = registry.load("backends", "cpu")
CORES = len(os.sched_getaffinity(0))


def made(**options):
    return CPU(CPU.Options(**options))


def test_workers_share_the_cores_unless_the_run_file_says_how_many():
    assert made().sharing(1).threads == CORES
    assert made().sharing(CORES).device_resources() == {"CPU": 1.0} == made().sharing(10**6).device_resources()
    assert made(threads=3).sharing(CORES).device_resources() == {"CPU": 3.0}
    assert made().sharing(CORES).environment()["OMP_NUM_THREADS"] == "1"


def test_collectives_go_through_the_interface_of_the_address():
    loopback = next(
        name for name, entries in psutil.net_if_addrs().items()
        if any(entry.family == socket.AF_INET and entry.address == "127.0.0.1" for entry in entries)
    )  # fmt: skip
    assert made().network("127.0.0.1") == {"GLOO_SOCKET_IFNAME": loopback}
    assert made().network("192.0.2.1") == {}


def test_the_engines_cache_has_the_size_that_is_asked_for():
    assert made(kv_cache_gib=0.5).engine_options("vllm") == {"kv_cache_memory_bytes": 2**29}
    assert made().engine_options("torch") == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_their_definitions_and_so_are_their_gradients(dtype):
    angles = noise((1, 5, 8), 2).repeat(1, 1, 2)

    def norm(inputs):
        states, weight = inputs
        return [operators.rms_norm(SimpleNamespace(weight=weight, variance_epsilon=1e-6), states)]

    def norm_defined(inputs):
        states, weight = inputs
        return [states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight]

    def rotated(inputs):
        return operators.rotated(*inputs, angles.cos(), angles.sin())

    def rotated_defined(inputs):
        cosine, sine = angles.double().cos()[:, None], angles.double().sin()[:, None]
        return [one * cosine + torch.cat((-one[..., 8:], one[..., :8]), dim=-1) * sine for one in inputs]

    for ours, defined, shapes in (
        (norm, norm_defined, ((2, 5, 16), (16,))), (rotated, rotated_defined, ((1, 4, 5, 16), (1, 2, 5, 16))),
    ):  # fmt: skip
        inputs = [(noise(shape, seed) + 0.5).to(dtype) for seed, shape in enumerate(shapes)]
        assert max(distances(inputs, HOST, ours, defined)) < LIMITS[dtype], ours.__name__
