"""vLLM's refusals for want of memory, real ones: each names the setting, and what to set it to is enough."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
from rlcore_backends.vllm import relief as vllm_relief
from rlcore_backends.vllm.relief import Relief

from rlcore import registry
from rlcore.config.sections import RolloutConfig
from rlcore.errors import ConfigError, OutOfMemory

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
LONGEST = 1900
GIB = 2**30


@pytest.fixture(scope="module")
def start(models):
    """Start an engine with these options of the backend and of vLLM; returns it, or its OutOfMemory's shortage."""
    registry.load("models", "tiny_llama")(models / "relief_llama", hidden_size=256, layers=1)  # heads of 64
    cpu = registry.load("backends", "cpu")

    def begin(backend=None, **options):
        folder, device = models / "relief_llama", cpu(cpu.Options(threads=1, **(backend or {"kv_cache_gib": 0.01})))
        config = RolloutConfig(engine="vllm", options=options)
        family = registry.load("families", "llama")(folder)
        try:
            return registry.load("rollout_engines", "vllm")(family, folder, device, config, torch.float32, LONGEST, 0)
        except OutOfMemory as error:
            return error.shortage

    return begin


def of(shortage):
    """Settings of the first remedy, as options of the backend or of the engine."""
    assert shortage.relief, shortage.said
    key, _, value = shortage.relief[0].overrides[0].partition("=")
    return key.rpartition(".")[0], {key.rpartition(".")[2]: float(value) if "." in value else int(value)}


def test_a_cache_too_small_for_a_sample_is_made_large_enough_or_the_sample_shorter(start):
    shortage = start({"kv_cache_gib": 0.0008})
    assert "max seq len (1900)" in shortage.said and "Try" not in shortage.said, "vLLM's own advice is left out"
    assert shortage.memory == "host" and 0 < shortage.fits < LONGEST
    section, options = of(shortage)
    assert section == "backend.options" and 0.0008 < options["kv_cache_gib"] < 0.004
    engine = start(options, max_num_seqs=16)
    assert engine.device_bytes() > 0
    assert engine.relief() == [], "half of this cache could not hold a sample, and 16 samples at a time are few"


def test_a_cache_without_room_for_a_block_gets_a_gibibyte(start):
    section, options = of(start({"kv_cache_gib": 1e-7}))
    assert section == "backend.options" and options["kv_cache_gib"] == pytest.approx(1, rel=0.02)
    section, options = of(start(kv_cache_memory_bytes=-1))
    assert section == "rollout.options" and options == {"kv_cache_memory_bytes": GIB}


def test_a_cache_larger_than_the_memory_is_made_smaller(start):
    shortage = start({"kv_cache_gib": 100000})
    section, options = of(shortage)
    there = float(re.search(r"\(([\d.]+)/", shortage.said)[1])
    assert section == "backend.options" and options["kv_cache_gib"] == pytest.approx(0.9 * there, rel=1e-3)


def test_a_share_of_the_memory_goes_up_for_the_cache_and_down_for_what_is_not_free(start):
    """The two errors of `gpu_memory_utilization`, here a share of host memory."""
    section, options = of(start(kv_cache_memory_bytes=None, gpu_memory_utilization=0.01))
    assert (section, options) == ("rollout.options", {"gpu_memory_utilization": 0.11})
    shortage = start(kv_cache_memory_bytes=None, gpu_memory_utilization=0.9999)
    section, options = of(shortage)
    free, total = map(float, re.search(r"\(([\d.]+)/([\d.]+) GiB\)", shortage.said).groups())
    assert section == "rollout.options" and free / total - 0.03 < options["gpu_memory_utilization"] < free / total


def test_a_cache_that_cannot_be_allocated_is_made_smaller(start, monkeypatch):
    """torch's own error, which vLLM does not explain."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    monkeypatch.setattr(CPUWorker, "initialize_from_config", lambda *_, **__: torch.empty(2**50, dtype=torch.uint8))
    shortage = start({"kv_cache_gib": 2})
    assert "can't allocate memory" in shortage.said and shortage.memory == "host"
    assert [remedy.overrides[0] for remedy in shortage.relief] == [
        "backend.options.kv_cache_gib=1.0", "rollout.options.max_num_seqs=128",
    ]  # fmt: skip


def test_a_running_engine_knows_what_it_chose(start):
    engine = start({"kv_cache_gib": 0.01})
    sequences, cache = (engine.relief()[number] for number in (1, 0))
    assert (cache.overrides, cache.now) == (("backend.options.kv_cache_gib=0.005",), "0.01")
    assert sequences.now == "256" and sequences.overrides == ("rollout.options.max_num_seqs=128",)


def test_other_refusals_are_the_users_mistake(start):
    with pytest.raises(ConfigError, match=r"vLLM refuses to start: (.|\n)*dtype"):
        start(dtype="float7")
    with pytest.raises(ConfigError, match=r"distributed_executor_backend: 'ray' would run the engine in other processes"):
        start(distributed_executor_backend="ray")


# a device's share, by the words of vLLM's own functions


def refused(backend, arguments, said, memory=None):
    kind = registry.load("backends", backend)
    device = kind(kind.Options())
    device.free_memory = lambda: memory
    arguments = {**device.engine_options("vllm"), "max_model_len": 4096, **arguments}
    return Relief(arguments, arguments, device, 4096).refused(ValueError(said)) if arguments else None


def too_small(available, needed, longest=4096, fits=0):
    from vllm.v1.core.kv_cache_utils import _check_enough_kv_cache_memory

    with pytest.raises(ValueError) as raised:
        _check_enough_kv_cache_memory(available, lambda: needed, longest, lambda memory: fits)
    return str(raised.value)


def given(shortage):
    return [remedy.overrides[0] for remedy in shortage.relief]


@pytest.mark.parametrize(("share", "raised"), [(0.5, ["0.6"]), (0.9, ["0.95"]), (0.95, [])])
def test_a_share_without_room_for_blocks_is_raised_to_95_percent_at_most(share, raised):
    shortage = refused("cuda", {"gpu_memory_utilization": share, "enforce_eager": True}, too_small(0, GIB))
    key = "rollout.options.gpu_memory_utilization"
    assert given(shortage) == [*(f"{key}={one}" for one in raised), "rollout.options.max_num_seqs=128"]


def test_a_share_is_raised_by_what_one_sample_lacks():
    said = too_small(GIB, 5 * GIB, fits=800)
    shortage = refused("cuda", {"gpu_memory_utilization": 0.5}, said, memory=(0, 80 * GIB))
    assert given(shortage) == ["rollout.options.gpu_memory_utilization=0.56"] and shortage.fits == 800
    assert "one sample of 4096 tokens needs 5.0 GiB of cache, of which there are 1.0" in shortage.relief[0].why
    full = refused("cuda", {"gpu_memory_utilization": 0.93}, said, memory=(0, 80 * GIB))
    assert given(full) == [] and full.fits == 800, "only shorter samples are left"
    long = refused("cuda", {"gpu_memory_utilization": 0.93, "max_model_len": 9000}, too_small(GIB, 5 * GIB, 9000))
    assert given(long)[0] == "rollout.options.max_model_len=4096", "no sample is longer than 4096"


@pytest.mark.parametrize(("free", "lowered"), [(30, ["0.36"]), (10, [])])
def test_a_share_that_is_not_free_is_lowered_to_what_is(free, lowered):
    from vllm.config import CacheConfig
    from vllm.utils.mem_utils import MemorySnapshot
    from vllm.v1.worker.utils import request_memory

    snapshot = MemorySnapshot(free_memory=free * GIB, total_memory=80 * GIB, device="cpu", auto_measure=False)
    with pytest.raises(ValueError) as raised:
        request_memory(snapshot, CacheConfig(gpu_memory_utilization=0.5))
    shortage = refused("cuda", {"gpu_memory_utilization": 0.5}, str(raised.value))
    assert given(shortage) == [f"rollout.options.gpu_memory_utilization={one}" for one in lowered]


@pytest.mark.parametrize(("backend", "option"), [("cuda", "engine_memory"), ("npu", "engine_memory"), ("cpu", "kv_cache_gib")])
def test_the_key_is_the_one_that_is_in_effect(backend, option):
    kind = registry.load("backends", backend)
    device = kind(kind.Options())
    assert device.engine_memory_option == option and option in kind.Options.model_fields
    plain = Relief(device.engine_options("vllm"), {}, device, 64).memory
    assert (plain.key, plain.now) == (f"backend.options.{option}", getattr(device.options, option))
    options = {"gpu_memory_utilization": 0.3}
    both = Relief({**device.engine_options("vllm"), **options}, options, device, 64).memory
    expected = ("backend.options.kv_cache_gib", 1.0) if backend == "cpu" else ("rollout.options.gpu_memory_utilization", 0.3)
    assert (both.key, both.now) == expected, "a cache size overrides the share"
    size = {"kv_cache_memory_bytes": 5}
    sized = Relief({**device.engine_options("vllm"), **size}, size, device, 64).memory
    assert (sized.key, sized.now) == ("rollout.options.kv_cache_memory_bytes", 5)


def test_vllms_words_are_known():
    assert vllm_relief._TOO_LONG.search(too_small(GIB, 2 * GIB, fits=9))["fits"] == "9"
    assert vllm_relief._TOO_LONG.search(too_small(GIB, 2 * GIB))["fits"] is None
