"""The cpu backend: what its workers share, and what it tells the engine and the collectives."""

from __future__ import annotations

import os
import socket

import psutil

from rlcore import registry

CPU = registry.load("backends", "cpu")
CORES = len(os.sched_getaffinity(0))


def made(**options):
    return CPU(CPU.Options(**options))


def test_workers_share_the_cores_unless_the_run_file_says_how_many():
    assert made().sharing(1).threads == CORES
    assert made().sharing(CORES).bundle() == {"CPU": 1.0} == made().sharing(10**6).bundle()
    assert made(threads=3).sharing(CORES).bundle() == {"CPU": 3.0}
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
