"""Environment of every process of a run: the user's settings, else the device plugin's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlcore import registry
from rlcore.config.schema import RunConfig
from rlcore.errors import ConfigError
from rlcore.runtime.watchdog import Watchdog

DEVICES = ("cpu", "cuda", "npu")


def made(name, **options):
    kind = registry.load("backends", name)
    return kind(kind.Options(**options))


@pytest.mark.parametrize("name", DEVICES)
def test_what_the_user_has_set_wins_and_is_known_apart(name):
    free = [variable for variable in made(name).environment() if not list(made(name).conflicts({variable: "mine"}))]
    assert len(free) >= 5
    for variable in free:
        backend, environment = made(name), {"HOME": "/home/user", variable: "mine"}
        expected = backend.environment() | environment
        backend.apply_environment(environment)
        assert environment == expected and backend.given == {variable: "mine"}


@pytest.mark.parametrize("name", DEVICES)
def test_an_engine_in_a_process_of_its_own_is_refused_before_anything_is_set(name):
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    said = rf"backend\.name {name}: .* unset them.*\n  VLLM_ENABLE_V1_MULTIPROCESSING=1, needed is 0 \(the engine is in"
    with pytest.raises(ConfigError, match=said):
        made(name).apply_environment(environment)
    assert environment == {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def test_an_allocator_that_is_set_under_its_older_name_stays():
    backend, environment = made("cuda"), {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    backend.apply_environment(environment)
    assert environment["PYTORCH_ALLOC_CONF"] == backend.given["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_ALLOC_CONF": "max_split_size_mb:32"}
    made("cuda").apply_environment(environment)
    assert environment["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:32", "which torch reads first"


@pytest.mark.parametrize(("name", "variable", "value"), [
    ("cuda", "PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync"),
    ("cuda", "PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, backend:cudaMallocAsync"),
    ("npu", "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True"),
])  # fmt: skip
def test_an_allocator_that_no_engine_can_sleep_on_is_refused_with_both_remedies(name, variable, value):
    for level in (1, 2):
        with pytest.raises(ConfigError, match=rf"unset them, or change the option(.|\n)*{variable}={value}, .*sleep_level"):
            made(name, sleep_level=level).apply_environment({variable: value})
    made(name, sleep_level=0).apply_environment({variable: value})


def test_an_allocator_that_torch_does_not_read_is_no_conflict():
    unread = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "PYTORCH_ALLOC_CONF": "backend:native"}
    made("cuda").apply_environment(unread)


def test_workers_on_ray_have_what_the_user_has_set_and_their_share_of_the_rest(tiny_llama, cluster):
    from rlcore_backends.ray import pools as ray_pools

    from rlcore.model.resolved import ResolvedModel

    config = RunConfig.model_validate({
        "model": {"path": str(tiny_llama), "precision": "fp32"}, "data": {"train": {"name": "arithmetic"}},
        "placement": {"kind": "ray", "devices": 2, "options": {"wait_seconds": 30}},
    })  # fmt: skip
    backend, environment = made("cpu"), {"TORCH_CPP_LOG_LEVEL": "WARNING", "UNRELATED": "1"}
    backend.apply_environment(environment)
    with ray_pools.open_pools(ResolvedModel(config, backend), Watchdog(0, Path())) as placement:
        for member in placement.pools[0].members:
            pid = member.where.split()[1]
            started = dict(entry.partition("=")[::2] for entry in Path(f"/proc/{pid}/environ").read_text().split("\0"))
            assert started["TORCH_CPP_LOG_LEVEL"] == "WARNING" != os.environ["TORCH_CPP_LOG_LEVEL"]
            assert started["OMP_NUM_THREADS"] == str(max(1, backend.threads // 2)) and "UNRELATED" not in started
