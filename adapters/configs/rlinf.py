"""RLinf's run file of a supervised run (examples/sft), with the defaults of its trainer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlcore.config.foreign.table import (
    Given,
    Mapped,
    Outcome,
    Table,
    Together,
    Unneeded,
    Unsupported,
    all_of,
    only,
    to,
    unneeded,
)
from rlcore.config.foreign.values import flag, interval, number, text, texts, whole

from . import shared
from .shared import DATA, MODEL

_RUNNER, _CLUSTER, _DATA = "runner.", "cluster.", "data."
_ACTOR, _RATE, _FSDP = "actor.", "actor.optim.", "actor.fsdp_config."
_EPOCHS, _STEPS, _TOTAL = f"{_RUNNER}max_epochs", f"{_RUNNER}max_steps", f"{_RATE}total_training_steps"
_COLUMNS = {  # key -> option of the data set robo2vlm, and the column that it reads if it is not told
    "prompt_key": ("question", "question"), "choice_key": ("choices", "choices"), "answer_key": ("answer", "correct_answer"),
}  # fmt: skip
_ANSWER = 64  # tokens
_SCHEDULES = {"constant": "constant", "torch_constant": "constant", "cosine": "cosine"}
_PRECISIONS = {"fp32": "fp32", "float32": "fp32", "32": "fp32", "bf16": "bf16", "bfloat16": "bf16"}


def _supervised(given: Given) -> None:
    task = given(f"{_RUNNER}task_type", text)
    if task != "sft":
        raise given.error(f"{_RUNNER}task_type", f"only supervised runs (sft) are read; it is {task!r}")


def _length(given: Given) -> Outcome:
    """Whether max_epochs counts steps is seen in the schedule, which ends with the run."""
    epochs, steps = given.get(_EPOCHS, whole) or -1, given.get(_STEPS, whole) or -1
    if steps > 0:
        return Mapped({"sft.steps": steps}, f"{_EPOCHS} {epochs} is not reached first" if epochs > 0 else "")
    if epochs <= 0:
        raise given.error(_EPOCHS, f"must be set, or {_STEPS}")
    if epochs == given.get(_TOTAL, whole):
        why = f"{_EPOCHS} counts optimizer steps where the schedule has as many ({_TOTAL})"
        return Mapped({"sft.steps": epochs}, f"{why}; if your version counts passes over the rows, set sft.epochs instead")
    why = "passes over the rows; versions of early 2026 count optimizer steps"
    return Mapped({"sft.epochs": epochs}, f"{why}: then set sft.steps={epochs} instead")


def _schedule(given: Given) -> Outcome:
    rate, name = given(f"{_RATE}lr", number), given(f"{_RATE}lr_scheduler", text)
    if name not in _SCHEDULES:
        raise given.error(f"{_RATE}lr_scheduler", f"must be one of {', '.join(_SCHEDULES)}; it is {name!r}")
    settings: dict[str, Any] = {"sft.optimizer.lr": rate, "sft.optimizer.schedule": _SCHEDULES[name]}
    if name == "cosine":
        share = given(f"{_RATE}min_lr_rate", number)
        settings["sft.optimizer.min_lr"] = given(f"{_RATE}min_lr", number, share * rate)
    warmup, ratio = given(f"{_RATE}lr_warmup_steps", whole), given(f"{_RATE}lr_warmup_steps_ratio", number)
    if warmup >= 0 or not ratio:
        return Mapped(settings | {"sft.optimizer.warmup_steps": max(warmup, 0)})
    total = given(_TOTAL, whole)
    note = f"warm-up is {ratio:g} of {total} steps"
    return Mapped(settings | {"sft.optimizer.warmup_steps": round(ratio * total)}, note)


def _data(given: Given) -> Sequence[Outcome]:
    train = given.get(f"{_DATA}train_data_paths", texts)
    held_out = given.get(f"{_DATA}eval_data_paths", texts) or given.get(f"{_DATA}val_data_paths", texts)
    name = given(f"{_DATA}dataset_name", text)
    if name != "robo2vlmsft":
        return [Unsupported(f"no data set of the kind {name}: name one of yours under data.train (docs/data.md)")]
    sets, options = {}, _options(given)
    for key, paths in ((DATA, train), ("data.eval", held_out)):
        found = [{"name": "robo2vlm", "path": path} | ({"options": options} if options else {}) for path in paths or ()]
        if found:
            named = {str(number): one for number, one in enumerate(found)} if key == "data.eval" else _sources(found)
            sets[key] = found[0] if len(found) == 1 else named
    if held_out:
        sets |= {"evaluation.before": False, "evaluation.max_new_tokens": _ANSWER}
        sets["evaluation.every"] = given(f"{_RUNNER}val_check_interval", interval, 0)
    note = f"each held-out row is scored once, with an answer of up to {_ANSWER} tokens; there, rows that fill no batch are not"
    return [Mapped(sets if train or not held_out else {DATA: None, **sets}, note if held_out else "")]


def _options(given: Given) -> dict[str, Any]:
    """Columns that are not the data set's own."""
    named = {option: (given.get(f"{_DATA}{key}", text), own) for key, (option, own) in _COLUMNS.items()}
    options: dict[str, Any] = {option: column for option, (column, own) in named.items() if column not in (None, own)}
    images = given.get(f"{_DATA}image_keys", texts)
    return options | ({"images": images} if images not in (None, ["image"]) else {})


def _sources(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one | {"source": f"part{number}"} for number, one in enumerate(sets)]


def _microbatches(given: Given) -> Outcome:
    rows, prompt = given(f"{_ACTOR}micro_batch_size", whole), given(f"{_DATA}max_prompt_length", whole)
    capped = shared.token_cap(rows * prompt, prompt + _ANSWER, f"{rows} rows of up to {prompt} tokens, packed")
    dropped = "longer rows are dropped and counted; there, no length is checked"
    return Mapped({**capped.settings, "data.max_prompt_tokens": prompt}, shared.notes(capped.note, dropped))


def _precision(given: Given) -> Outcome:
    own = given(f"{_ACTOR}model.precision", text)
    name = given.get(f"{_FSDP}mixed_precision.param_dtype", text) or own
    if name not in _PRECISIONS:
        raise given.error(f"{_FSDP}mixed_precision.param_dtype", f"must be one of {', '.join(_PRECISIONS)}; it is {name!r}")
    note = "weights, moments and gradient sums are fp32, and products in this precision" if name != own or own != "fp32" else ""
    return Mapped({"model.precision": _PRECISIONS[name]}, note)


def _sharding(given: Given) -> Outcome:
    """reshard_after_forward is fsdp2's; fsdp has shard_grad_op for it."""
    strategy = given(f"{_FSDP}sharding_strategy", text)
    nodes = given(f"{_CLUSTER}num_nodes", whole)
    kinds = {
        "full_shard": {"sharding.replicas": 1},
        "shard_grad_op": {"sharding.reshard_after_forward": False},
        "hybrid_shard": {"sharding.replicas": nodes},
        "no_shard": {"sharding.replicas": "all"},
    }
    if strategy not in kinds:
        raise given.error(f"{_FSDP}sharding_strategy", f"must be one of {', '.join(kinds)}; it is {strategy!r}")
    settings = dict(kinds[strategy])
    if given(f"{_FSDP}strategy", text) == "fsdp2" and strategy != "shard_grad_op":
        settings["sharding.reshard_after_forward"] = given(f"{_FSDP}reshard_after_forward", flag)
    return Mapped(settings, f"one copy a node, of {nodes}" if strategy == "hybrid_shard" else "")


def _placement(given: Given) -> Outcome:
    """Ranges of devices (0-7) have a number, `all` has none."""
    where = given(f"{_CLUSTER}component_placement.actor", text)
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?(?::\S*)?", part.strip()) for part in where.split(",")]
    if where == "all" or not all(ranges):
        used = "examples/launch.sh uses every device of every node; without it set placement.devices"
        return Mapped({"placement.kind": "ray", "placement.offload": ["engine"]}, used)
    count = sum(int(one[2] or one[1]) - int(one[1]) + 1 for one in ranges if one)
    return Mapped({"placement.kind": "ray", "placement.offload": ["engine"], "placement.devices": count})


def _lora(given: Given) -> Outcome:
    if not given(f"{_ACTOR}model.is_lora", flag):
        return Unneeded("every weight is trained")
    rank = given(f"{_ACTOR}model.lora_rank", whole)
    return Mapped({"model.lora.rank": rank, "model.lora.alpha": rank}, "alpha is the rank: the matrices' product is not scaled")


def _loggers(value: Any) -> Outcome:
    names = texts(value)
    if others := [name for name in names if name != "tensorboard"]:
        return Unsupported(f"{', '.join(others)}: there is no such logger; read metrics.jsonl or TensorBoard")
    return Mapped({"logging.tensorboard": "tensorboard" in names})


_CHOSEN = ("use_orig_params", "offload_pin_memory", "forward_prefetch", "limit_all_gathers", "backward_prefetch")

TABLE = Table(
    "RLinf",
    "sft",
    keys={
        "defaults": shared.composed,
        "hydra.**": unneeded(shared.FOLDER),
        f"{_RUNNER}task_type": unneeded("the command is rlcore sft"),
        f"{_RUNNER}save_interval": to("train.save_every", interval),
        f"{_RUNNER}logger.logger_backends": _loggers,
        f"{_RUNNER}logger.*": unneeded(shared.FOLDER),
        f"{_RUNNER}experiment_name": unneeded(shared.FOLDER),
        f"{_RUNNER}output_dir": unneeded(shared.FOLDER),
        f"{_RUNNER}resume_dir": only("", shared.FOREIGN_CHECKPOINT),
        f"{_DATA}type": unneeded("rows with and without images may be in one run"),
        f"{_DATA}apply_chat_template": only(True, "rows always go through the model's chat template", "they do"),
        f"{_DATA}use_chat_template": only(True, "rows always go through the model's chat template", "they do"),
        f"{_DATA}lazy_loading": unneeded("files are read row by row"),
        f"{_DATA}num_workers": unneeded(shared.LOADED),
        f"{_DATA}shuffle": only(True, "rows are shuffled in any case, by `seed`", "rows are shuffled, anew in each pass"),
        f"{_DATA}seed": unneeded("all seeds follow `seed`"),
        f"{_DATA}answer_separator": only("", "the answer follows the chat template's own text"),
        "algorithm.*": unneeded("supervised runs have no advantages"),
        f"{_ACTOR}group_name": unneeded("roles have names of their own"),
        f"{_ACTOR}training_backend": unneeded("weights are sharded by FSDP2, which does not change the numbers"),
        f"{_ACTOR}eval_batch_size": unneeded(shared.ENGINE_BATCHES),
        f"{_ACTOR}global_batch_size": to("sft.rows_per_step", whole),
        f"{_ACTOR}seed": to("seed", whole),
        f"{_ACTOR}model.model_path": to(MODEL, text),
        f"{_ACTOR}model.model_type": unneeded("the family is read from the model's config.json"),
        f"{_RATE}weight_decay": to("sft.optimizer.weight_decay", number),
        f"{_RATE}clip_grad": to("sft.optimizer.max_grad_norm", number),
        f"{_RATE}adam_eps": to("sft.optimizer.eps", number),
        f"{_RATE}num_cycles": only(0.5, "a cosine falls once", "a cosine falls once"),
        f"{_FSDP}gradient_checkpointing": to("train.gradient_checkpointing", flag),
        f"{_FSDP}cpu_offload": to("sharding.cpu_offload", flag),
        f"{_FSDP}enable_gradient_accumulation": unneeded("gradients are summed over micro-batches"),
        f"{_FSDP}save_full_model_weights": unneeded(shared.HF_CHECKPOINT),
        **all_of((f"{_FSDP}grad_scaler.*", f"{_FSDP}amp_autocast.*"), unneeded("bf16 needs no scaling; see model.precision")),
        f"{_FSDP}mixed_precision.*_dtype": unneeded("gradients are summed in fp32"),
        f"{_FSDP}use_liger_kernel": unneeded("the head is computed in tiles, and kernels are the backend's"),
        **all_of((f"{_FSDP}{key}" for key in _CHOSEN), unneeded("FSDP2 chooses it")),
        "reward.use_reward_model": only(False, "rows are graded by a rule"),
        "critic.use_critic_model": only(False, "supervised runs have no critic"),
    },
    together=(
        Together((_EPOCHS, _STEPS, _TOTAL), _length),
        Together(
            (
                f"{_RATE}lr", f"{_RATE}lr_scheduler", f"{_RATE}min_lr", f"{_RATE}min_lr_rate", f"{_RATE}lr_warmup_steps",
                f"{_RATE}lr_warmup_steps_ratio",
            ),
            _schedule,
        ),
        Together(
            (f"{_RATE}adam_beta1", f"{_RATE}adam_beta2"),
            lambda given: Mapped({"sft.optimizer.betas": [given(f"{_RATE}adam_beta{place}", number) for place in (1, 2)]}),
        ),
        Together(
            (
                f"{_DATA}dataset_name", f"{_DATA}train_data_paths", f"{_DATA}eval_data_paths", f"{_DATA}val_data_paths",
                f"{_RUNNER}val_check_interval", *(f"{_DATA}{key}" for key in _COLUMNS), f"{_DATA}image_keys",
            ),
            _data,
        ),
        Together((f"{_ACTOR}micro_batch_size", f"{_DATA}max_prompt_length"), _microbatches),
        Together((f"{_ACTOR}model.precision", f"{_FSDP}mixed_precision.param_dtype"), _precision),
        Together((f"{_FSDP}strategy", f"{_FSDP}sharding_strategy", f"{_FSDP}reshard_after_forward"), _sharding),
        Together((f"{_CLUSTER}num_nodes", f"{_CLUSTER}component_placement.actor"), _placement),
        Together((f"{_ACTOR}model.is_lora", f"{_ACTOR}model.lora_rank"), _lora),
    ),
    defaults={
        f"{_RUNNER}task_type": "sft",
        f"{_DATA}dataset_name": "robo2vlmsft",
        f"{_DATA}max_prompt_length": 1024,
        f"{_ACTOR}micro_batch_size": 1,
        f"{_ACTOR}model.precision": "fp32",
        f"{_ACTOR}model.is_lora": False,
        f"{_ACTOR}model.lora_rank": 32,
        f"{_RATE}lr_scheduler": "constant",
        f"{_RATE}min_lr_rate": 0.0,
        f"{_RATE}lr_warmup_steps": 0,
        f"{_RATE}lr_warmup_steps_ratio": 0.0,
        f"{_RATE}adam_beta1": 0.9,
        f"{_RATE}adam_beta2": 0.999,
        f"{_FSDP}strategy": "fsdp",
        f"{_FSDP}sharding_strategy": "full_shard",
        f"{_FSDP}reshard_after_forward": True,
        f"{_CLUSTER}num_nodes": 1,
        f"{_CLUSTER}component_placement.actor": "all",
    },
    always=(
        Mapped({"reward": [{"name": "robo2vlm"}]}, "an evaluation compares the whole line `A. text`"),
        Mapped({"rollout.max_new_tokens": _ANSWER}, "for evaluations"),
    ),
    required={MODEL: f"{_ACTOR}model.model_path", DATA: f"{_DATA}train_data_paths"},
    check=_supervised,
)
