"""Environment variables for the processes of every device: defaults, and the values a run requires."""

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
"""Required values, and why."""

_SPELLINGS = {"0": ("0", "false", ""), "1": ("1", "true"), "true": ("1", "true")}


def wrong(needed: Mapping[str, tuple[str, str]], given: Mapping[str, str]) -> Iterator[str]:
    """Yield a message per variable of `given` that is set to another value than needed."""
    for name, (value, why) in needed.items():
        if name in given and given[name].lower() not in _SPELLINGS.get(value, (value,)):
            yield f"{name}={given[name]}, needed is {value} ({why})"


def sleepless(name: str, setting: str, given: Mapping[str, str]) -> Iterator[str]:
    """Yield a message when torch's allocator has a setting whose memory vLLM's sleep mode cannot free."""
    if setting.lower() in given.get(name, "").lower().replace(" ", "").split(","):
        yield f"{name}={given[name]}, needed is one without {setting} (backend.options.sleep_level: no engine can sleep on it)"
