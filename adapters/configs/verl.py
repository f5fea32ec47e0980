"""verl's run file (verl/trainer/config/ppo_trainer.yaml), with the defaults that it composes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rlcore.config.foreign.table import (
    Below,
    Given,
    Mapped,
    Outcome,
    Table,
    Together,
    Unneeded,
    Unsupported,
    all_of,
    if_on,
    only,
    to,
    unneeded,
)
from rlcore.config.foreign.values import flag, interval, number, numbers, text, texts, top_k, whole

from . import shared
from .shared import CAP, DATA, MODEL

_DATA, _ALGORITHM, _TRAINER, _CRITIC = "data.", "algorithm.", "trainer.", "critic."
_MODEL, _ACTOR, _ROLLOUT, _REFERENCE = (f"actor_rollout_ref.{part}." for part in ("model", "actor", "rollout", "ref"))
_RATE, _VALIDATION = f"{_ACTOR}optim.", f"{_ROLLOUT}val_kwargs."
_PROMPTS, _BATCH, _GROUP = f"{_DATA}train_batch_size", f"{_ACTOR}ppo_mini_batch_size", f"{_ROLLOUT}n"
_ADVANTAGES: Mapping[str, Mapping[str, Any]] = {
    "gae": {"algorithm.advantage": "gae"},
    "grpo": {"algorithm.advantage": "group", "algorithm.advantage_eps": 1e-6},
    "rloo": {"algorithm.advantage": "leave_one_out"},
    "reinforce_plus_plus": {"algorithm.advantage": "batch"},
    "reinforce_plus_plus_baseline": {"algorithm.advantage": "batch_over_group"},
}
_ESTIMATORS = {"kl": "kl", "k1": "kl", "abs": "abs", "mse": "mse", "k2": "mse", "low_var_kl": "low_var_kl", "k3": "low_var_kl"}
_AGGREGATIONS = {
    "token-mean": "token_mean", "seq-mean-token-sum": "sequence_sum", "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum-norm": "constant",
}  # fmt: skip
_SCHEDULES = ("constant", "cosine")
REWARDS = {**shared.REWARDS, "openai/gsm8k": [{"name": "gsm8k"}], "lighteval/MATH": [{"name": "math"}]}
_CORRECTION = f"{_ALGORITHM}rollout_correction."
_FILTER = f"{_ALGORITHM}filter_groups."
_REFILLS = 10  # where the file has no limit
_TOOLS = "conversations with tools are not sampled here"


def _one_of(given: Given, key: str, names: Sequence[str]) -> str:
    name = given(key, text)
    if name not in names:
        raise given.error(key, f"must be one of {', '.join(names)}; it is {name!r}")
    return name


def _batches(given: Given) -> Outcome:
    """Both batch sizes count prompts; rollout.n multiplies them."""
    prompts, size, batch = given(_PROMPTS, whole), given(_GROUP, whole), given(_BATCH, whole)
    asked = shared.share(given, _BATCH, prompts, min(batch, prompts), f"prompts ({_PROMPTS})")
    steps, fewer = shared.minibatches(prompts, asked)
    arithmetic = (
        f"{prompts} prompts x {size} = {prompts * size} samples a step; an optimizer step has {min(batch, prompts)} prompts x"
        f" {size} samples, so there are {asked} of them"
    )
    settings = {"train.prompts_per_step": prompts, "algorithm.group_size": size, "train.minibatches_per_step": steps}
    return Mapped(settings, shared.notes(arithmetic, fewer))


def _steps(given: Given) -> Outcome:
    steps = _training_steps(given)
    if given.get(f"{_TRAINER}total_training_steps", whole) is not None:
        return Mapped({"train.steps": steps})
    each = (given.rows or 0) // given(_PROMPTS, whole)
    return Mapped({"train.steps": steps}, f"{given.rows} rows / {given(_PROMPTS, whole)} prompts = {each} steps a pass")


def _training_steps(given: Given) -> int:
    """Training steps, which verl counts in passes over the rows unless told their number."""
    total, epochs = given.get(f"{_TRAINER}total_training_steps", whole), given(f"{_TRAINER}total_epochs", whole)
    if total is not None:
        return total
    if given.rows is None:
        raise given.error(
            f"{_TRAINER}total_epochs",
            f"{epochs} passes over the rows are as many steps as there are rows for: give their number (--rows N), or"
            f" {_TRAINER}total_training_steps=N",
        )
    if given.rows < (prompts := given(_PROMPTS, whole)):
        raise given.error(_PROMPTS, f"{prompts} prompts a step are more than the {given.rows} rows that there are (--rows)")
    return given.rows // prompts * epochs


def _updates(given: Given) -> int:
    """Optimizer steps a training step."""
    prompts = given(_PROMPTS, whole)
    return prompts // min(given(_BATCH, whole), prompts) * given(f"{_ACTOR}ppo_epochs", whole)


def _rate(given: Given) -> Outcome:
    """verl advances the schedule once a training step, this run file once an optimizer step."""
    rate, style = given(f"{_RATE}lr", number), given.get(f"{_RATE}lr_scheduler_type", text)
    style = style or _one_of(given, f"{_RATE}warmup_style", _SCHEDULES)
    if style not in _SCHEDULES:
        raise given.error(f"{_RATE}lr_scheduler_type", f"must be one of {', '.join(_SCHEDULES)}; it is {style!r}")
    settings: dict[str, Any] = {"optimizer.lr": rate, "optimizer.schedule": style}
    if style == "cosine":
        settings["optimizer.min_lr"] = rate * given(f"{_RATE}min_lr_ratio", number)
    warmup, ratio = given(f"{_RATE}lr_warmup_steps", whole), given(f"{_RATE}lr_warmup_steps_ratio", number)
    if warmup < 0 and ratio:
        warmup = int(ratio * _training_steps(given))
    if warmup <= 0:
        return Mapped(settings)
    each = _updates(given)
    note = f"warm-up over {warmup} steps of {each} optimizer steps" if each > 1 else ""
    return Mapped(settings | {"optimizer.warmup_steps": warmup * each}, note)


def _clip(given: Given) -> Outcome:
    """The two limits; clip_ratio is only what they are where they are null."""
    both = given(f"{_ACTOR}clip_ratio", number)
    low, high = (given.get(f"{_ACTOR}clip_ratio_{side}", number) for side in ("low", "high"))
    ignored = f"clip_ratio {both:g} has no effect beside clip_ratio_low and clip_ratio_high" if low not in (None, both) else ""
    return Mapped(
        {"algorithm.clip_low": both if low is None else low, "algorithm.clip_high": both if high is None else high}, ignored
    )


def _divergence(given: Given) -> Sequence[Outcome]:
    in_loss, in_reward = given(f"{_ACTOR}use_kl_loss", flag), given(f"{_ALGORITHM}use_kl_in_reward", flag)
    if not in_loss and not in_reward:
        return [Mapped({"algorithm.kl_coef": 0.0}, "no divergence: neither use_kl_loss nor use_kl_in_reward is on")]
    where, name, coefficient = (
        ("loss", f"{_ACTOR}kl_loss_type", f"{_ACTOR}kl_loss_coef")
        if in_loss
        else ("reward", f"{_ALGORITHM}kl_penalty", f"{_ALGORITHM}kl_ctrl.kl_coef")
    )
    estimator = _ESTIMATORS[_one_of(given, name, tuple(_ESTIMATORS))]
    settings: dict[str, Any] = {
        "algorithm.kl_in": where, "algorithm.kl_coef": given(coefficient, number), "algorithm.kl_estimator": estimator,
    }  # fmt: skip
    if not in_loss and given(f"{_ALGORITHM}kl_ctrl.type", text) == "adaptive":
        settings["algorithm.kl_target"] = given(f"{_ALGORITHM}kl_ctrl.target_kl", number)
        settings["algorithm.kl_horizon"] = given(f"{_ALGORITHM}kl_ctrl.horizon", whole)
    both = Unsupported("the divergence is in the loss or in the reward (algorithm.kl_in), not in both: the loss has it")
    return [Mapped(settings), *([both] if in_loss and in_reward else [])]


def _advantage(given: Given) -> Outcome:
    name = _one_of(given, f"{_ALGORITHM}adv_estimator", tuple(_ADVANTAGES))
    settings = dict(_ADVANTAGES[name])
    if name == "grpo":
        settings["algorithm.advantage_std"] = "sample" if given(f"{_ALGORITHM}norm_adv_by_std_in_grpo", flag) else "none"
    if name == "gae":
        settings["algorithm.gae_gamma"] = given(f"{_ALGORITHM}gamma", number)
        settings["algorithm.gae_lambda"] = given(f"{_ALGORITHM}lam", number)
        settings["algorithm.value_clip"] = given(f"{_CRITIC}cliprange_value", number)
        settings["critic"] = _critic(given)
    return Mapped(settings)


def _critic(given: Given) -> dict[str, Any]:
    path, policy = given.get(f"{_CRITIC}model.path", text), given.get(f"{_MODEL}path", text)
    own = {"path": path} if path not in (None, policy) else {}
    rate, decay = given(f"{_CRITIC}optim.lr", number), given(f"{_CRITIC}optim.weight_decay", number)
    return own | {"optimizer": {"lr": rate, "weight_decay": decay}}


def _aggregation(given: Given) -> Outcome:
    name = _AGGREGATIONS[_one_of(given, f"{_ACTOR}loss_agg_mode", tuple(_AGGREGATIONS))]
    if name == "constant":
        length = given(f"{_DATA}max_response_length", whole)
        return Mapped({"algorithm.aggregation": name, "algorithm.aggregation_length": length})
    if name == "token_mean":
        why = "over all tokens of an optimizer step; there, over those of each micro-batch, whose size so changes the loss"
        return Mapped({"algorithm.aggregation": name}, why)
    return Mapped({"algorithm.aggregation": name})


def _refills(given: Given) -> Outcome:
    if not given(f"{_FILTER}enable", flag, False):
        return Unneeded("it is off")
    batches = given(f"{_FILTER}max_num_gen_batches", whole, 0)
    if batches > 0:
        return Mapped({"algorithm.max_refills": batches - 1}, f"{batches} times a step, of which the first is no refill")
    return Mapped({"algorithm.max_refills": _REFILLS}, f"{_REFILLS} times at most, and not without end")


def _correction(given: Given) -> Outcome:
    name = given.get(f"{_CORRECTION}rollout_is", text)
    if name is None:
        return Unneeded("it is off")
    settings = {"algorithm.correction": f"{_one_of(given, f'{_CORRECTION}rollout_is', ('token', 'sequence'))}_tis"}
    return Mapped(settings | {"algorithm.correction_high": given(f"{_CORRECTION}rollout_is_threshold", number, 2.0)})


def _overlong(given: Given, place: str) -> Outcome:
    """DAPO's penalty, whose buffer is a share of the longest response here."""
    if not given(f"{place}enable", flag, False):
        return Unneeded("it is off")
    length, longest = given(f"{place}len", whole), given(f"{_DATA}max_response_length", whole)
    penalty = given(f"{place}penalty_factor", number)
    note = f"the buffer is {length} of {longest} tokens"
    return Mapped({"algorithm.overlong_share": length / longest, "algorithm.overlong_penalty": penalty}, note)


def _data(given: Given) -> Outcome | Sequence[Outcome]:
    options = {}
    for key, option, own in (("image_key", "images", "images"), ("reward_fn_key", "source", "data_source")):
        if (column := given(f"{_DATA}{key}", text)) != own:
            options[option] = column
    train, held_out = given.get(f"{_DATA}train_files", texts), given.get(f"{_DATA}val_files", texts)
    settings = dict(shared.training_data(train, **options)) if train else {}
    settings |= shared.held_out_data(held_out, **options) if held_out else {}
    column = given(f"{_DATA}prompt_key", text)
    if column in ("prompt", "messages"):
        return Mapped(settings)
    return [Mapped(settings), Unsupported(f"rename the column {column} to prompt, or use the data set rows (docs/data.md)")]


def _evaluation(given: Given) -> Outcome:
    every, before = given(f"{_TRAINER}test_freq", interval), given(f"{_TRAINER}val_before_train", flag)
    if not given.get(f"{_DATA}val_files", texts) or not (every or before):
        return Unneeded("nothing is evaluated")
    samples = given(f"{_VALIDATION}n", whole)
    greedy = not given(f"{_VALIDATION}do_sample", flag)
    settings = {
        "evaluation.every": every,
        "evaluation.before": before,
        "evaluation.max_new_tokens": given(f"{_DATA}max_response_length", whole),
        "evaluation.temperature": 0.0 if greedy else given(f"{_VALIDATION}temperature", number),
    }
    if greedy or not settings["evaluation.temperature"]:
        one = f"{samples} greedy responses would be the same: one is sampled" if samples > 1 else ""
        return Mapped(settings, one)
    limits = {"evaluation.top_p": given(f"{_VALIDATION}top_p", number), "evaluation.top_k": given(f"{_VALIDATION}top_k", top_k)}
    return Mapped({**settings, **limits, "evaluation.samples": samples})


def _long_prompts(given: Given) -> Outcome:
    cut = _one_of(given, f"{_DATA}truncation", ("error", "left", "right", "middle"))
    if given(f"{_DATA}filter_overlong_prompts", flag):
        return Mapped({"data.long_prompts": "drop"})
    if cut == "error":
        return Mapped({"data.long_prompts": "refuse"})
    return Mapped({"data.long_prompts": "drop"}, f"a prompt that is too long is dropped and counted, not cut ({cut})")


def _microbatches(given: Given) -> Outcome:
    """A row that several devices share holds what all of them may."""
    longest, devices = _longest(given), given(f"{_ACTOR}ulysses_sequence_parallel_size", whole)
    if given(f"{_ACTOR}use_dynamic_bsz", flag):
        tokens = given(f"{_ACTOR}ppo_max_token_len_per_gpu", whole)
        how = f"{tokens} tokens on each of {devices} devices that share a row" if devices > 1 else ""
        return shared.token_cap(tokens * devices, longest, how)
    samples = given.get(f"{_ACTOR}ppo_micro_batch_size_per_gpu", whole)
    return Unneeded(f"{CAP} keeps its default") if samples is None else shared.per_samples(samples, longest)


def _longest(given: Given) -> int:
    return given(f"{_DATA}max_prompt_length", whole) + given(f"{_DATA}max_response_length", whole)


def _devices(given: Given) -> Outcome:
    nodes, each = given(f"{_TRAINER}nnodes", whole), given(f"{_TRAINER}n_gpus_per_node", whole)
    if nodes * each == 1:
        return Mapped({"placement.kind": "local", "placement.devices": 1})
    note = f"{nodes} nodes x {each} devices, on each of which every role takes its turn"
    return Mapped({"placement.kind": "ray", "placement.devices": nodes * each}, note if nodes > 1 else "")


def _parked(given: Given) -> Outcome:
    switches = {
        "parameters": f"{_ACTOR}fsdp_config.param_offload", "optimizer": f"{_ACTOR}fsdp_config.optimizer_offload",
        "engine": f"{_ROLLOUT}free_cache_engine",
    }  # fmt: skip
    parked = [part for part, key in switches.items() if given(key, flag)]
    compares = given(f"{_ACTOR}use_kl_loss", flag) or given(f"{_ALGORITHM}use_kl_in_reward", flag)
    if compares and given(f"{_REFERENCE}fsdp_config.param_offload", flag):
        parked.append("reference")
    return Mapped({"placement.offload": parked})


def _lora(given: Given) -> Outcome:
    rank = given(f"{_MODEL}lora_rank", whole)
    if not rank:
        return Unneeded("every weight is trained")
    targets = given(f"{_MODEL}target_modules", lambda value: value if value == "all-linear" else texts(value))
    alpha = given(f"{_MODEL}lora_alpha", number)
    return Mapped({"model.lora.rank": rank, "model.lora.alpha": alpha, "model.lora.targets": targets})


def _loggers(value: Any) -> Outcome:
    names = texts(value)
    if others := [name for name in names if name not in ("console", "tensorboard")]:
        return Unsupported(f"{', '.join(others)}: there is no such logger; read metrics.jsonl, or the TensorBoard files")
    return Mapped({"logging.tensorboard": "tensorboard" in names})


def _surrogate(value: Any) -> Outcome:
    if (name := text(value)) == "vanilla":
        return Unneeded("each token's ratio is clipped")
    if name == "gspo":
        return Mapped({"algorithm.surrogate": "sequence_clip"})
    return Unsupported("see algorithm.surrogate (docs/algorithms.md) for the losses that there are")


def _manager(value: Any) -> Outcome:
    if text(value) in ("naive", "dapo"):
        return Unneeded("a response has one score; DAPO's penalty for length is algorithm.overlong_penalty")
    return Unsupported("write a reward function (docs/rewards.md)")


def _graded(value: Any) -> Outcome:
    return Unsupported(f"name your function by its dotted path under reward (docs/rewards.md), in place of {text(value)}")


def _dual_clip(value: Any) -> Outcome:
    bound = f"the loss of a token with a negative advantage is not bounded by {number(value):g} x |advantage| (dual clip)"
    return Unsupported(f"{bound}; algorithm.final_clip bounds every token's")


def _strategy(value: Any) -> Outcome:
    if text(value).startswith("fsdp"):
        return Unneeded(shared.SHARDED)
    return Mapped({}, "trained with FSDP2 on the Hugging Face weights, whatever the layout of the weights there")


_KERNELS = ("use_liger", "use_fused_kernels")
_FSDP = (
    "dtype", "entropy_checkpointing", "entropy_from_logits_with_chunking", "forward_only", "forward_prefetch", "model_dtype",
    "mixed_precision", "strategy", "ulysses_sequence_parallel_size", "use_orig_params", "use_torch_compile",
    "wrap_policy.min_num_params",
)  # fmt: skip
_LOSS = (
    "calculate_entropy", "calculate_sum_pi_squared", "entropy_checkpointing", "entropy_from_logits_with_chunking",
    "sum_pi_squared_checkpointing", "use_fused_kernels", "use_torch_compile",
)  # fmt: skip
_SERVING = (
    "calculate_log_probs", "cudagraph_capture_sizes", "disable_log_stats", "dtype", "layered_summon", "load_format",
    "logprobs_mode", "mode", "multi_stage_wake_up", "quantization_config_file", "scheduling_policy", "skip_dump_dir",
    "skip_tokenizer_init", "update_weights_bucket_megabytes",
)  # fmt: skip
_READING = (
    "dataloader_num_workers", "filter_overlong_prompts_workers", "image_patch_size", "return_full_prompt",
    "return_multi_modal_inputs", "return_raw_chat", "return_raw_input_ids", "use_shm", "validation_shuffle",
)  # fmt: skip
_FOLDERS = (
    "default_hdfs_dir", "default_local_dir", "del_local_ckpt_after_load", "experiment_name", "log_val_generations",
    "max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep", "project_name", "rollout_data_dir", "validation_data_dir",
)  # fmt: skip
_LAUNCHING = ("esi_redundant_time", "ray_wait_register_center_timeout", "use_legacy_worker_impl")
_OWN = "the engine and the weight sync have settings of their own"

TABLE = Table(
    "verl",
    "grpo",
    keys={
        "**._target_": unneeded("Hydra builds an object of it"),
        "defaults": shared.composed,
        "hydra.**": unneeded(shared.FOLDER),
        f"{_MODEL}path": to(MODEL, text),
        f"{_MODEL}enable_gradient_checkpointing": to("train.gradient_checkpointing", flag),
        f"{_MODEL}custom_chat_template": to("data.chat_template", text),
        f"{_MODEL}trust_remote_code": shared.TRUST,
        f"{_MODEL}external_lib": only("", "install the model's family as a plugin (rlcore.families)"),
        f"{_MODEL}override_config": only({}, "change the model folder's config.json", "it is empty"),
        f"{_MODEL}exclude_modules": only("", "list the modules that have LoRA: model.lora.targets"),
        f"{_MODEL}lora_adapter_path": only("", "merge the adapter into the model folder"),
        f"{_MODEL}mtp.enable": only(False, "extra prediction heads are neither trained nor used"),
        f"{_MODEL}mtp.*": unneeded("mtp.enable is what counts"),
        f"{_MODEL}hf_config_path": unneeded("config.json is in the model folder"),
        f"{_MODEL}tokenizer_path": unneeded("the tokenizer is in the model folder"),
        f"{_MODEL}enable_activation_offload": unneeded("train.gradient_checkpointing keeps activations small"),
        f"{_MODEL}use_remove_padding": unneeded("rows are packed; there is no padding"),
        f"{_MODEL}use_shm": unneeded("the model folder is read where it is"),
        **all_of((f"{_MODEL}{key}" for key in _KERNELS), unneeded("kernels are the backend's")),
        f"{_ACTOR}strategy": _strategy,
        f"{_ACTOR}entropy_coeff": to("algorithm.entropy_coef", number),
        f"{_ACTOR}ppo_epochs": to("train.epochs_per_step", whole),
        f"{_ACTOR}grad_clip": to("optimizer.max_grad_norm", number),
        f"{_ACTOR}clip_ratio_c": _dual_clip,
        f"{_ACTOR}policy_loss.loss_mode": _surrogate,
        f"{_ACTOR}policy_loss.*": unneeded("policy_loss.loss_mode is what counts"),
        f"{_ACTOR}shuffle": unneeded("a step's groups are shuffled over its optimizer steps"),
        f"{_ACTOR}ulysses_sequence_parallel_size": to("sharding.sequence_parallel", whole),
        f"{_ACTOR}ppo_micro_batch_size": only("", "give ppo_micro_batch_size_per_gpu, or a cap of tokens"),
        f"{_RATE}weight_decay": to("optimizer.weight_decay", number),
        f"{_RATE}betas": to("optimizer.betas", numbers),
        f"{_RATE}num_cycles": only(0.5, "a cosine falls once", "a cosine falls once"),
        f"{_RATE}total_training_steps": unneeded("the schedule ends with the run"),
        f"{_ACTOR}fsdp_config.fsdp_size": only(-1, "set sharding.replicas: the number of copies", "one copy over all devices"),
        f"{_ACTOR}fsdp_config.offload_policy": to("sharding.cpu_offload", flag),
        f"{_ACTOR}fsdp_config.reshard_after_forward": to("sharding.reshard_after_forward", flag),
        f"{_ACTOR}fsdp_config.full_determinism": only(False, "see backend.options of your devices"),
        f"{_ACTOR}fsdp_config.seed": unneeded("all seeds follow `seed`"),
        **all_of((f"{_ACTOR}fsdp_config.{key}" for key in _FSDP), unneeded("FSDP2 and model.precision settle it")),
        f"{_ACTOR}checkpoint.*": unneeded("a checkpoint has the model as a Hugging Face folder, the optimizer and all states"),
        f"{_ACTOR}freeze_vision_tower": if_on("model.freeze", "vision"),
        f"{_ACTOR}router_replay.mode": only("disabled", "mixture-of-experts models are not trained here"),
        f"{_ACTOR}router_replay.*": unneeded("router_replay.mode is what counts"),
        f"{_ACTOR}loss_scale_factor": only("", "see algorithm.aggregation_length"),
        f"{_ACTOR}data_loader_seed": unneeded("all seeds follow `seed`"),
        f"{_ACTOR}rollout_n": unneeded("rollout.n is the size of a group"),
        f"{_ACTOR}tau_*": unneeded("they are another loss_mode's"),
        f"{_ACTOR}use_remove_padding": unneeded("rows are packed; there is no padding"),
        f"{_ACTOR}use_prefix_grouper": unneeded("a prompt is computed once for its group"),
        **all_of((f"{_ACTOR}{key}" for key in _LOSS), unneeded("the head is computed in tiles, and entropy with it")),
        f"{_RATE}clip_grad": unneeded("actor.grad_clip is what counts"),
        f"{_RATE}optimizer": only("AdamW", "the optimizer is AdamW", "it is"),
        f"{_RATE}override_optimizer_config": only("", "see optimizer.*"),
        f"{_RATE}optimizer_impl": unneeded("the backend chooses the implementation of AdamW"),
        f"{_REFERENCE}**": unneeded("the reference is model.path as it is before training, run as the actor is"),
        f"{_ROLLOUT}name": shared.engine,
        f"{_ROLLOUT}temperature": to("rollout.temperature", number),
        f"{_ROLLOUT}top_p": to("rollout.top_p", number),
        f"{_ROLLOUT}top_k": to("rollout.top_k", top_k),
        f"{_ROLLOUT}tensor_model_parallel_size": to("rollout.tensor_parallel", whole),
        f"{_ROLLOUT}gpu_memory_utilization": to("rollout.options.gpu_memory_utilization", number),
        f"{_ROLLOUT}max_num_seqs": to("rollout.options.max_num_seqs", whole),
        f"{_ROLLOUT}max_num_batched_tokens": to("rollout.options.max_num_batched_tokens", whole),
        f"{_ROLLOUT}enforce_eager": lambda value: shared.eager(flag(value)),
        f"{_ROLLOUT}enable_chunked_prefill": unneeded(shared.ENGINE_BATCHES),
        f"{_ROLLOUT}do_sample": only(True, "greedy samples of a prompt are the same and teach nothing", "it is on"),
        f"{_ROLLOUT}ignore_eos": only(False, "a response ends with its end-of-response token"),
        f"{_ROLLOUT}prompt_length": unneeded("data.max_prompt_tokens is the limit"),
        f"{_ROLLOUT}response_length": unneeded("rollout.max_new_tokens is the limit"),
        f"{_ROLLOUT}max_model_len": unneeded(shared.LONGEST),
        f"{_ROLLOUT}engine_kwargs.*": unneeded("it is empty"),
        f"{_ROLLOUT}engine_kwargs.*.*": Below("rollout.options"),
        f"{_ROLLOUT}multi_turn.enable": only(False, _TOOLS),
        f"{_ROLLOUT}multi_turn.**": unneeded("multi_turn.enable is what counts"),
        f"{_ROLLOUT}agent.**": unneeded(shared.ENGINE_BATCHES),
        f"{_ROLLOUT}enable_prefix_caching": to("rollout.options.enable_prefix_caching", flag),
        f"{_ROLLOUT}quantization": only("", "an engine serves the actor's own weights"),
        f"{_ROLLOUT}skip_rollout": only(False, "every step samples"),
        f"{_ROLLOUT}over_sample_rate": only(0, "every response of a group is awaited"),
        f"{_ROLLOUT}*_parallel_size": only(1, "an engine is split by rollout.tensor_parallel alone", "it is 1"),
        f"{_ROLLOUT}enable_rollout_routing_replay": only(False, "mixture-of-experts models are not trained here"),
        f"{_ROLLOUT}log_prob_*": unneeded(shared.PACKED),
        **all_of((f"{_ROLLOUT}{key}" for key in _SERVING), unneeded("the engine and the weight sync choose it")),
        **all_of((f"{_ROLLOUT}{part}.**" for part in ("mtp", "trace", "prometheus", "checkpoint_engine")), unneeded(_OWN)),
        "actor_rollout_ref.hybrid_engine": only(True, "see placement.pools", "every role is in one pool"),
        "actor_rollout_ref.nccl_timeout": unneeded("see placement.stall_seconds"),
        "**.profiler.**": unneeded(shared.MEASURED),
        f"{_MODEL}tiled_mlp.*": unneeded("kernels are the backend's"),
        f"{_MODEL}fused_kernel_options.*": unneeded("kernels are the backend's"),
        f"{_DATA}max_prompt_length": to("data.max_prompt_tokens", whole),
        f"{_DATA}max_response_length": to("rollout.max_new_tokens", whole),
        f"{_DATA}val_batch_size": unneeded(shared.ENGINE_BATCHES),
        f"{_DATA}gen_batch_size": unneeded("a step draws again where groups have no spread: algorithm.max_refills"),
        f"{_DATA}shuffle": only(True, "rows are shuffled in any case, by `seed`", "rows are shuffled, anew in each pass"),
        f"{_DATA}seed": to("seed", whole),
        f"{_DATA}trust_remote_code": shared.TRUST,
        f"{_DATA}tokenizer": unneeded("the tokenizer is in the model folder"),
        f"{_DATA}video_key": unneeded("videos are not read"),
        f"{_DATA}custom_cls.*": only("", "name your function by its dotted path: data.train.name (docs/data.md)"),
        f"{_DATA}sampler.*": only("", "rows are drawn in shuffled order, or by the weights of data.train"),
        f"{_DATA}apply_chat_template_kwargs.*": Below("data.chat_template_options"),
        f"{_DATA}train_max_samples": only(-1, "set data.train.max_rows", "all are read"),
        f"{_DATA}val_max_samples": only(-1, "set data.eval.max_rows", "all are read"),
        f"{_DATA}tool_config_path": only("", _TOOLS),
        f"{_DATA}apply_chat_template_kwargs": unneeded("it is empty"),
        **all_of((f"{_DATA}{key}" for key in _READING), unneeded("rows are read and rendered as they are drawn")),
        f"{_DATA}datagen.*": only("", "rows are read from files"),
        f"{_CRITIC}**": unneeded("the critic is trained as the actor is; see critic.optimizer"),
        "reward_model.enable": only(False, "write a reward function that asks the model (docs/rewards.md)"),
        "reward_model.reward_manager": _manager,
        "reward_manager.name": _manager,
        "reward_manager.**": unneeded("reward_manager.name is what counts"),
        "transfer_queue.**": unneeded("groups go to the devices that need them (docs/placement.md)"),
        "reward_model.**": unneeded("reward_model.enable is what counts"),
        "custom_reward_function.path": _graded,
        "custom_reward_function.**": unneeded("custom_reward_function.path is what counts"),
        f"{_ALGORITHM}use_pf_ppo": only(False, "every sample is trained on once an epoch"),
        f"{_ALGORITHM}pf_ppo.*": unneeded("use_pf_ppo is what counts"),
        f"{_FILTER}metric": unneeded("a group whose rewards are all equal is replaced"),
        f"{_CORRECTION}rollout_rs": only("", "see algorithm.correction: icepop and geometric leave samples out"),
        f"{_CORRECTION}*": unneeded("rollout_is and rollout_rs are what counts"),
        f"{_TRAINER}device": to("backend.name", text),
        f"{_TRAINER}save_freq": to("train.save_every", interval),
        f"{_TRAINER}logger": _loggers,
        f"{_TRAINER}critic_warmup": only(0, "actor and critic learn from the first step"),
        f"{_TRAINER}val_only": only(False, "run rlcore eval"),
        f"{_TRAINER}resume_mode": unneeded(shared.RESUME),
        f"{_TRAINER}resume_from_path": unneeded(shared.RESUME),
        f"{_TRAINER}balance_batch": unneeded("groups are dealt to ranks by their tokens"),
        **all_of((f"{_TRAINER}{key}" for key in _FOLDERS), unneeded(shared.FOLDER)),
        **all_of((f"{_TRAINER}{key}" for key in _LAUNCHING), unneeded(shared.LAUNCHED)),
        "global_profiler.**": unneeded(shared.MEASURED),
        "ray_kwargs.**": unneeded(shared.LAUNCHED),
        "ray_init.**": unneeded(shared.LAUNCHED),
    },
    together=(
        Together((_PROMPTS, _GROUP, _BATCH), _batches),
        Together((f"{_TRAINER}total_training_steps", f"{_TRAINER}total_epochs"), _steps),
        Together(
            (
                f"{_RATE}lr", f"{_RATE}warmup_style", f"{_RATE}lr_scheduler_type", f"{_RATE}min_lr_ratio",
                f"{_RATE}lr_warmup_steps", f"{_RATE}lr_warmup_steps_ratio",
            ),
            _rate,
        ),
        Together((f"{_ACTOR}clip_ratio", f"{_ACTOR}clip_ratio_low", f"{_ACTOR}clip_ratio_high"), _clip),
        Together(
            (
                f"{_ACTOR}use_kl_loss", f"{_ACTOR}kl_loss_coef", f"{_ACTOR}kl_loss_type", f"{_ALGORITHM}use_kl_in_reward",
                f"{_ALGORITHM}kl_penalty", f"{_ALGORITHM}kl_ctrl.type", f"{_ALGORITHM}kl_ctrl.kl_coef",
                f"{_ALGORITHM}kl_ctrl.horizon", f"{_ALGORITHM}kl_ctrl.target_kl",
            ),
            _divergence,
        ),
        Together(
            (
                f"{_ALGORITHM}adv_estimator", f"{_ALGORITHM}norm_adv_by_std_in_grpo", f"{_ALGORITHM}gamma", f"{_ALGORITHM}lam",
                f"{_CRITIC}model.path", f"{_CRITIC}optim.lr", f"{_CRITIC}optim.weight_decay", f"{_CRITIC}cliprange_value",
            ),
            _advantage,
        ),
        Together((f"{_ACTOR}loss_agg_mode",), _aggregation),
        Together((f"{_FILTER}enable", f"{_FILTER}max_num_gen_batches"), _refills),
        Together((f"{_CORRECTION}rollout_is", f"{_CORRECTION}rollout_is_threshold"), _correction),
        *(
            Together(tuple(f"{place}{name}" for name in ("enable", "len", "penalty_factor")), partial(_overlong, place=place))
            for place in ("reward_model.overlong_buffer.", "reward_model.reward_kwargs.overlong_buffer_cfg.")
        ),
        Together(
            (
                f"{_DATA}train_files", f"{_DATA}val_files", f"{_DATA}prompt_key", f"{_DATA}image_key", f"{_DATA}reward_fn_key",
            ),
            _data,
        ),
        Together(
            (
                f"{_TRAINER}test_freq", f"{_TRAINER}val_before_train", f"{_VALIDATION}n", f"{_VALIDATION}do_sample",
                f"{_VALIDATION}temperature", f"{_VALIDATION}top_p", f"{_VALIDATION}top_k",
            ),
            _evaluation,
        ),
        Together((f"{_DATA}truncation", f"{_DATA}filter_overlong_prompts"), _long_prompts),
        Together(
            (
                f"{_ACTOR}use_dynamic_bsz", f"{_ACTOR}ppo_max_token_len_per_gpu", f"{_ACTOR}ppo_micro_batch_size_per_gpu",
            ),
            _microbatches,
        ),
        Together((f"{_TRAINER}nnodes", f"{_TRAINER}n_gpus_per_node"), _devices),
        Together(
            (
                f"{_ACTOR}fsdp_config.param_offload", f"{_ACTOR}fsdp_config.optimizer_offload",
                f"{_REFERENCE}fsdp_config.param_offload", f"{_ROLLOUT}free_cache_engine",
            ),
            _parked,
        ),
        Together((f"{_MODEL}lora_rank", f"{_MODEL}lora_alpha", f"{_MODEL}target_modules"), _lora),
    ),
    defaults={
        _PROMPTS: 1024,
        _BATCH: 256,
        _GROUP: 1,
        f"{_DATA}max_prompt_length": 512,
        f"{_DATA}max_response_length": 512,
        f"{_DATA}prompt_key": "prompt",
        f"{_DATA}image_key": "images",
        f"{_DATA}reward_fn_key": "data_source",
        f"{_DATA}truncation": "error",
        f"{_DATA}filter_overlong_prompts": False,
        f"{_MODEL}enable_gradient_checkpointing": True,
        f"{_MODEL}lora_rank": 0,
        f"{_MODEL}lora_alpha": 16,
        f"{_MODEL}target_modules": "all-linear",
        f"{_ACTOR}use_dynamic_bsz": False,
        f"{_ACTOR}ppo_max_token_len_per_gpu": 16384,
        f"{_ACTOR}ppo_epochs": 1,
        f"{_ACTOR}ulysses_sequence_parallel_size": 1,
        f"{_ACTOR}clip_ratio": 0.2,
        f"{_ACTOR}use_kl_loss": False,
        f"{_ACTOR}kl_loss_coef": 0.001,
        f"{_ACTOR}kl_loss_type": "low_var_kl",
        f"{_ACTOR}loss_agg_mode": "token-mean",
        f"{_ACTOR}fsdp_config.param_offload": False,
        f"{_ACTOR}fsdp_config.optimizer_offload": False,
        f"{_REFERENCE}fsdp_config.param_offload": False,
        f"{_RATE}lr": 1e-6,
        f"{_RATE}warmup_style": "constant",
        f"{_RATE}min_lr_ratio": 0.0,
        f"{_RATE}lr_warmup_steps": -1,
        f"{_RATE}lr_warmup_steps_ratio": 0.0,
        f"{_RATE}weight_decay": 0.01,
        f"{_ROLLOUT}free_cache_engine": True,
        f"{_ROLLOUT}tensor_model_parallel_size": 2,
        f"{_ROLLOUT}gpu_memory_utilization": 0.5,
        f"{_VALIDATION}n": 1,
        f"{_VALIDATION}do_sample": False,
        f"{_VALIDATION}temperature": 0.0,
        f"{_VALIDATION}top_p": 1.0,
        f"{_VALIDATION}top_k": -1,
        f"{_ALGORITHM}adv_estimator": "gae",
        f"{_ALGORITHM}norm_adv_by_std_in_grpo": True,
        f"{_ALGORITHM}use_kl_in_reward": False,
        f"{_ALGORITHM}kl_penalty": "kl",
        f"{_ALGORITHM}kl_ctrl.type": "fixed",
        f"{_ALGORITHM}kl_ctrl.kl_coef": 0.001,
        f"{_ALGORITHM}kl_ctrl.horizon": 10000,
        f"{_ALGORITHM}kl_ctrl.target_kl": 0.1,
        f"{_ALGORITHM}gamma": 1.0,
        f"{_ALGORITHM}lam": 1.0,
        f"{_CRITIC}optim.lr": 1e-5,
        f"{_CRITIC}optim.weight_decay": 0.01,
        f"{_CRITIC}cliprange_value": 0.5,
        f"{_TRAINER}total_epochs": 30,
        f"{_TRAINER}nnodes": 1,
        f"{_TRAINER}n_gpus_per_node": 8,
        f"{_TRAINER}test_freq": -1,
        f"{_TRAINER}val_before_train": True,
    },
    always=(Mapped({"reward": REWARDS}, "a row is graded by its data_source, and one that is not listed is an error"),),
    required={MODEL: f"{_MODEL}path", DATA: f"{_DATA}train_files"},
)
