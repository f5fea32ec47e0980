"""Environment variables that processes of every device are given."""

from __future__ import annotations

from collections.abc import Mapping

COMMON: Mapping[str, str] = {
    # the engine in this process: weights reach it by reference, and its samples follow this process's seed
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its threads would fight for the same cores
}
