"""Conversions and reasons that several frameworks share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rlcore import registry
from rlcore.config.foreign.table import Given, Mapped, Outcome, Unneeded, Unsupported, only
from rlcore.config.foreign.values import text

MODEL = "model.path"
DATA = "data.train"
CAP = "train.max_tokens_per_microbatch"

FOLDER = "a run has a folder of its own (--run-dir), with logs and checkpoints"
RESUME = "a run goes on with --resume from its own run folder"
HF_CHECKPOINT = "a checkpoint here holds a Hugging Face model folder, with its tokenizer"
FOREIGN_CHECKPOINT = "its checkpoints are not read: convert the weights to a Hugging Face folder and set model.path to it"
ENGINE_BATCHES = "the engine fills its own batches"
PACKED = "rows are packed up to train.max_tokens_per_microbatch in every forward pass"
SHARDED = "weights are sharded over all devices of the pool (FSDP2), which does not change the numbers"
WANDB_NAMES = "it is W&B's"
LAUNCHED = "the launcher and the backend set the environment (docs/launching.md)"
MEASURED = "each step's times and memory are always written (docs/metrics.md)"
LONGEST = "the engine's longest sequence is data.max_prompt_tokens + the longest max_new_tokens"
ORDER = "samples keep their prompts' order, whatever finishes first"
LOADED = "the next step's prompts are read while the engines work"
GRADED = "rewards are scored as groups finish; placement.reward_workers moves them to processes of their own"

WANDB = only(False, "there is no W&B logger; upload the run folder's TensorBoard files, or read metrics.jsonl")
TRUST = only(False, "code inside a model folder is not run; the model's family must be installed (model.family)", "none is run")

REWARDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "openai/gsm8k": [{"name": "math"}],
    "DigitalLearningGmbH/MATH-lighteval": [{"name": "math"}],
    "hiyouga/geometry3k": [{"name": "geo3k"}],
}
"""Rewards by data_source, as ChatLearn grades these; verl's differ in gsm8k."""


def engine(value: Any) -> Outcome:
    """A rollout engine by its name."""
    name = text(value)
    if name in registry.names("rollout_engines"):
        return Mapped({"rollout.engine": name})
    installed = ", ".join(registry.names("rollout_engines"))
    return Unsupported(f"no engine of that name is installed ({installed}); the run file leaves the choice to the backend")


def eager(value: bool) -> Outcome:
    if value:
        return Mapped({"rollout.options.enforce_eager": True})
    return Unneeded("the backend chooses graphs where its devices have them")


def training_data(paths: Sequence[str], weights: Sequence[float] = (), **options: Any) -> Mapping[str, Any]:
    """`data.train` of files in verl's layout: one data set, or a mixture whose sets are named after their files."""
    sets = [_rows(path, options) for path in paths]
    if len(sets) == 1:
        return {DATA: sets[0]}
    for path, one, weight in zip(paths, sets, weights or [None] * len(sets), strict=True):
        one |= {"source": _name(path, paths)} | ({"weight": weight} if weight is not None else {})
    return {DATA: sets}


def held_out_data(paths: Sequence[str], **options: Any) -> Mapping[str, Any]:
    sets = [_rows(path, options) for path in paths]
    if len(sets) == 1:
        return {"data.eval": sets[0]}
    return {"data.eval": {_name(path, paths): one for path, one in zip(paths, sets, strict=True)}}


def _rows(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "verl", "path": path} | ({"options": dict(options)} if options else {})


def _name(path: str, paths: Sequence[str]) -> str:
    """The file's name, or, where several have the same, its folder's with it."""
    names = [PurePath(one).stem for one in paths]
    return PurePath(path).stem if names.count(PurePath(path).stem) == 1 else "-".join(PurePath(path).with_suffix("").parts[-2:])


def token_cap(tokens: int, longest: int, how: str) -> Mapped:
    """The cap of a micro-batch, which must hold one sample of `longest` tokens. `how`: the arithmetic, where there is some."""
    if tokens >= longest:
        return Mapped({CAP: tokens}, how)
    raised = f"{tokens} tokens, raised to one sample's {longest}, which a micro-batch must hold"
    return Mapped({CAP: longest}, f"{how}; {raised}" if how else raised)


def per_samples(samples: int, longest: int) -> Mapped:
    """The cap that holds a micro-batch of so many of the longest samples."""
    how = f"{samples} samples of up to {longest} tokens = {samples * longest} tokens, into which shorter ones are packed"
    return token_cap(samples * longest, longest, how)


def minibatches(prompts: int, steps: int) -> tuple[int, str]:
    """Optimizer steps that `prompts` can be split into, at most `steps`, and a note where that is fewer."""
    possible = next(count for count in range(min(steps, prompts), 0, -1) if prompts % count == 0)
    if possible == steps:
        return steps, ""
    return possible, f"{possible} optimizer steps instead of {steps}, since each has whole groups, equally many of {prompts}"


def share(given: Given, key: str, whole: int, part: int, of: str) -> int:
    """whole / part; ConfigError where that leaves a rest, or nothing."""
    if min(whole, part) < 1 or whole % part:
        raise given.error(key, f"{whole} {of} cannot be split into equal parts of {part}")
    return whole // part


def notes(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def composed(value: Any) -> Outcome:
    """Hydra's list of files to compose: harmless where it only sets up Hydra itself."""
    entries = value if isinstance(value, list) else [value]
    named = [str(one) for one in entries if not re.match(r"_self_$|\{?'?(override )?hydra/", str(one))]
    if not named:
        return Unneeded(FOLDER)
    files = ", ".join(named)
    return Unsupported(f"{files}: files of a `defaults` list are not read; import the composed file (python ... --cfg job)")
