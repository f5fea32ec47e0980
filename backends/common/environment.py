"""Environment variables that processes of every device are given, and what of them a run cannot do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

COMMON: Mapping[str, str] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its threads would fight for the same cores
}

NEEDED: Mapping[str, tuple[str, str]] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": (
        "0", "the engine is in the worker's process: weights reach it by reference, and its samples follow the worker's seed"
    ),
}  # fmt: skip
"""What the run cannot work without, and why."""

_SPELLINGS = {"0": ("0", "false", ""), "1": ("1", "true"), "true": ("1", "true")}


def wrong(needed: Mapping[str, tuple[str, str]], given: Mapping[str, str]) -> Iterator[str]:
    """What is set to something else than is needed."""
    for name, (value, why) in needed.items():
        if name in given and given[name].lower() not in _SPELLINGS.get(value, (value,)):
            yield f"{name}={given[name]}, needed is {value} ({why})"


def sleepless(name: str, setting: str, given: Mapping[str, str]) -> Iterator[str]:
    """A setting of torch's allocator whose memory vLLM's sleep mode cannot take off the device."""
    if setting.lower() in given.get(name, "").lower().replace(" ", "").split(","):
        yield f"{name}={given[name]}, needed is one without {setting} (backend.options.sleep_level: no engine can sleep on it)"
