"""TRL's side of a race: runs one of the peer programs unchanged and times its stages.

`python peer_trl.py PROGRAM [ARGUMENT ...]` prints one JSON line per step. Environment: the program's own variables, and
FILLER, words put before every chat prompt; GROUP, samples per prompt instead of the program's.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rlcore_backends.cpu.backend import cure_torchvision

cure_torchvision()

import datasets  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

spent: defaultdict[str, float] = defaultdict(float)  # seconds by stage in the current step
sizes: defaultdict[str, int] = defaultdict(int)


class Watchdog(TrainerCallback):
    """Times whole steps; time outside generation and scoring counts as the update."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        spent.clear()
        sizes.clear()
        spent["start"] = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        whole = time.perf_counter() - spent["start"]
        generate, score = spent["generate"], spent["generate_and_score"] - spent["generate"]
        stages = {"generate": generate, "score": score, "update": whole - generate - score, "sync": 0.0, "all": whole}
        stages["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(stages | sizes), flush=True)


def timed(name: str, stage: str) -> None:
    original = getattr(GRPOTrainer, name)

    def method(self: GRPOTrainer, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = original(self, *arguments, **named)
        spent[stage] += time.perf_counter() - start
        if stage == "generate_and_score":
            sizes["response_tokens"] += int(result["completion_mask"].sum())
            sizes["prompt_tokens"] = int(result["prompt_mask"].sum(1).max())
        return result

    setattr(GRPOTrainer, name, method)


def watched(initialize: Any) -> Any:
    def __init__(self: GRPOTrainer, *arguments: Any, **named: Any) -> None:
        if "GROUP" in os.environ:
            named["args"].num_generations = int(os.environ["GROUP"])
        initialize(self, *arguments, **named)
        self.add_callback(Watchdog())

    return __init__


def filled(from_list: Any) -> Any:
    def replacement(rows: list[dict[str, Any]], *arguments: Any, **named: Any) -> Any:
        for row in rows:
            row["prompt"][0]["content"] = os.environ["FILLER"] + row["prompt"][0]["content"]
        return from_list(rows, *arguments, **named)

    return replacement


timed("_generate", "generate")
timed("_generate_and_score_completions", "generate_and_score")
GRPOTrainer.__init__ = watched(GRPOTrainer.__init__)
if os.environ.get("FILLER"):
    datasets.Dataset.from_list = filled(datasets.Dataset.from_list)
if Path(sys.argv[1]).stem == "trl_smol":
    from rlcore.config.sections import ModelConfig
    from rlcore.model.loading import resolve
    from rlcore.model.resolved import MODEL_CACHE

    os.environ.setdefault("SMOLLM2", str(resolve(ModelConfig(path="smollm2"), MODEL_CACHE)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
