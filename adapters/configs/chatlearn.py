"""ChatLearn's run file (chatlearn/configs, template/grpo_*.yaml), with the defaults of its config classes."""

from __future__ import annotations

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
    if_on,
    only,
    to,
    unneeded,
)
from rlcore.config.foreign.values import flag, interval, number, numbers, text, texts, top_k, whole

from . import shared
from .shared import CAP, DATA, MODEL, REWARDS

_RUN, _TRAINER, _REFERENCE, _POLICY = "runtime_args.", "models.policy_trainer.", "models.ref_policy.", "models.policy."
_OPTIMIZER = f"{_TRAINER}optimizer."
_GROUP, _POOLED = f"{_POLICY}num_inference_per_prompt", f"{_RUN}num_inference_per_prompt"
_SAMPLES, _BATCH = f"{_RUN}sample_per_episode", f"{_RUN}train_global_batch_size"
_ONE_SAMPLE = "no engine or trainer here has it; responses are sampled from the model's own distribution"


def _batches(given: Given) -> Outcome:
    """Samples an episode and samples an optimizer step, into prompts and optimizer steps."""
    samples, size, batch = given(_SAMPLES, whole), given(_GROUP, whole), given(_BATCH, whole)
    prompts = shared.share(given, _SAMPLES, samples, size, f"samples ({_GROUP} {size})")
    asked = shared.share(given, _BATCH, samples, batch, f"samples ({_SAMPLES})")
    steps, fewer = shared.minibatches(prompts, asked)
    updates = f"{samples} / {batch} = {asked} optimizer step{'s' * (asked > 1)}"
    arithmetic = f"{samples} samples / {size} a prompt = {prompts} prompts, {updates}"
    settings = {"algorithm.group_size": size, "train.prompts_per_step": prompts, "train.minibatches_per_step": steps}
    return Mapped(settings, shared.notes(arithmetic, fewer, _pooling(size, given(_POOLED, whole))))


def _pooling(size: int, pooled: int) -> str:
    """What the second place of the group size does to advantages there."""
    if size == pooled:
        return ""
    return (
        f"a group is the {size} samples of one prompt in one step; there, advantages wait for {_POOLED} = {pooled} rewards of a"
        " prompt, so that from the second pass over the data they also compare with samples of earlier policies"
    )


def _data(given: Given) -> Outcome:
    if (paths := given.get(f"{_RUN}data_path", texts)) is None:
        return Unneeded("it is not set")
    ratio = given.get(f"{_RUN}data_ratio", numbers) or []
    if ratio and len(ratio) != len(paths):
        raise given.error(f"{_RUN}data_ratio", f"{len(ratio)} numbers for {len(paths)} files of data_path")
    return Mapped(shared.training_data(paths, ratio if len(paths) > 1 else ()))


def _evaluation(given: Given) -> Outcome:
    if (paths := given.get(f"{_RUN}eval_data_path", texts)) is None:
        return Unneeded(f"{_RUN}eval_data_path names no held-out rows")
    every, before = given(f"{_RUN}eval_episode_interval", interval), given(f"{_RUN}enable_eval_before_training", flag)
    if not every and not before:
        return Mapped(shared.held_out_data(paths), "the rows are never evaluated on: set evaluation.every, or run rlcore eval")
    return Mapped({
        **shared.held_out_data(paths),
        "evaluation.every": every,
        "evaluation.before": before,
        "evaluation.max_new_tokens": given(f"{_POLICY}max_response_tokens_length", whole),
        "evaluation.temperature": given(f"{_POLICY}eval_temperature", number),
        "evaluation.top_p": given(f"{_POLICY}eval_top_p", number),
        "evaluation.top_k": given(f"{_POLICY}eval_top_k", top_k),
    })  # fmt: skip


def _saving(given: Given) -> Outcome:
    every, steps = given(f"{_RUN}save_episode_interval", interval), given(f"{_RUN}num_episode", whole)
    if every <= steps:
        return Mapped({"train.steps": steps, "train.save_every": every})
    never = f"{every} is beyond the last of {steps} episodes, so nothing is saved there; here the last step always is"
    return Mapped({"train.steps": steps, "train.save_every": 0}, never)


def _model(given: Given) -> Outcome | Sequence[Outcome]:
    """The Hugging Face folder: the engine's under Megatron, whose own weights are in another format."""
    backend = given(f"{_RUN}train_backend", text)
    engine, trainer, reference = (given.get(f"{role}load", text) for role in (_POLICY, _TRAINER, _REFERENCE))
    path = engine if backend == "megatron" else trainer or engine
    if path is None:
        return Unneeded("no model is set")
    outcomes: list[Outcome] = [Mapped({MODEL: path}, _loaded(backend, engine, path))]
    if reference is not None and reference not in (trainer, path):
        outcomes.append(Unsupported(f"the reference is always {path} as it is before training; another one cannot be given"))
    return outcomes


def _loaded(backend: str, engine: str | None, path: str) -> str:
    if backend == "megatron":
        return "every role reads the Hugging Face folder; trained with FSDP2, so no weights are converted before or after"
    return f"{engine} is not read: the engine is given the trainer's weights" if engine not in (None, path) else ""


def _microbatches(given: Given) -> Outcome:
    longest = given(f"{_POLICY}max_prompt_tokens_length", whole) + given(f"{_POLICY}max_response_tokens_length", whole)
    if given(f"{_TRAINER}packing", flag):
        note = "a cap that no micro-batch exceeds; there, a sample may"
        return shared.token_cap(given(f"{_TRAINER}max_token_in_packing", whole), longest, note)
    samples = given.get(f"{_TRAINER}train_micro_batch_size", whole) or given.get(f"{_RUN}train_micro_batch_size", whole)
    if samples is None:
        return Unneeded(f"{CAP} keeps its default")
    return shared.per_samples(samples, longest)


def _placement(given: Given) -> Outcome:
    """Colocated roles are one pool, others several."""
    colocated = set(given(f"{_RUN}colocation", texts, []))
    devices = {role: given.get(f"models.{role}.num_gpu", whole) for role in ("policy_trainer", "policy", "ref_policy")}
    trainers, engines = devices["policy_trainer"], devices["policy"] or devices["policy_trainer"]
    if trainers is None or engines is None:
        return Unneeded("the launcher uses every device (examples/launch.sh), or set placement.devices")
    if {"policy_trainer", "policy"} <= colocated:
        one = "" if engines == trainers else f"one pool of {trainers} devices; {engines} for the engine are another number"
        return Mapped({"placement.kind": "ray" if trainers > 1 else "local", "placement.devices": trainers}, one)
    pools = {"train": {"roles": ["actor"], "devices": trainers}, "sample": {"roles": ["rollout"], "devices": engines}}
    if given(f"{_TRAINER}kl_coef", number) and not {"policy_trainer", "ref_policy"} <= colocated:
        pools["reference"] = {"roles": ["reference"], "devices": devices["ref_policy"] or trainers}
    return Mapped({"placement.kind": "ray", "placement.pools": pools})


def _parked_reference(given: Given) -> Outcome:
    if not given(f"{_REFERENCE}free_gpu_memory.offload_weights", flag, False):
        return Unneeded("it is off")
    if not given(f"{_TRAINER}kl_coef", number):
        return Unneeded("algorithm.kl_coef 0 needs no reference, so none is loaded")
    return Mapped({"placement.offload": ["reference"]})


def _thinking(given: Given) -> Outcome:
    if given(f"{_RUN}model_type", text) == "vlm":
        return Unneeded("chat templates of vision-language models do not read it; data.chat_template_options if yours does")
    thinking = given(f"{_POLICY}enable_thinking", flag)
    note = "Qwen3's template thinks unless told not to; remove it for a template that does not read it"
    return Mapped({"data.chat_template_options.enable_thinking": thinking}, note)


def _rate(given: Given) -> Sequence[Outcome]:
    rate, least = given(f"{_OPTIMIZER}lr", number), given.get(f"{_OPTIMIZER}min_lr", number)
    outcomes: list[Outcome] = [Mapped({"optimizer.lr": rate})]
    if least not in (None, rate) and given(f"{_RUN}train_backend", text) == "megatron":
        remedy = "for one that falls, set optimizer.schedule and optimizer.min_lr"
        outcomes.append(Unsupported(f"the rate stays at {rate:g}; {remedy}"))
    return outcomes


def _sequence_ratio(value: Any) -> Outcome:
    if not flag(value):
        return Unneeded("ratios are those of tokens by default")
    note = "one ratio a response, with the clip range as given (3e-4 and 4e-4 in the paper's preset, algorithm.name: gspo)"
    return Mapped({"algorithm.surrogate": "sequence_clip"}, note)


def _recomputed(value: Any) -> Outcome:
    note = "" if value == "full" else "whole layers, not only attention"
    return Mapped({"train.gradient_checkpointing": True}, note)


def _grouped(value: Any) -> Outcome:
    return Mapped({"model.groupgemm": True}) if flag(value) else Unneeded("experts are grouped wherever the device can")


def _order(value: Any) -> Outcome:
    if flag(value):
        return Unneeded("rows are shuffled, anew in each pass")
    return Mapped({}, "rows are shuffled here in any case, by `seed`, anew in each pass")


TABLE = Table(
    "ChatLearn",
    "grpo",
    keys={
        f"{_RUN}num_training_epoch": to("train.epochs_per_step", whole),
        f"{_RUN}rollout_backend": shared.engine,
        f"{_RUN}data_shuffle": _order,
        f"{_RUN}task_type": only("chat", "agents that call tools are not trained here", "a prompt has one response"),
        f"{_RUN}use_partial_rollout": only(False, "a response is sampled in one step; leave it out"),
        f"{_RUN}consumed_samples": only(0, "a run begins at its first prompt; continue one with --resume"),
        f"{_RUN}max_replay_episode": unneeded("each step trains on its own samples"),
        f"{_RUN}replay_episode_offset": unneeded("each step trains on its own samples"),
        f"{_RUN}log_args_dict.enable_tensorboard": to("logging.tensorboard", flag),
        f"{_RUN}log_args_dict.enable_wandb": shared.WANDB,
        f"{_RUN}log_args_dict.wandb_*": unneeded(shared.WANDB_NAMES),
        f"{_RUN}log_args_dict.log_dir": unneeded(shared.FOLDER),
        f"{_RUN}log_args_dict.tensorboard_dir": unneeded(shared.FOLDER),
        f"{_RUN}exp_name": unneeded(shared.FOLDER),
        f"{_RUN}output_dir": unneeded(shared.FOLDER),
        f"{_RUN}data_checkpoint_path": unneeded(shared.RESUME),
        f"{_RUN}enable_resume_training": unneeded(shared.RESUME),
        f"{_RUN}load_data_checkpoint_iteration": unneeded(shared.RESUME),
        f"{_RUN}max_data_ckpt_nums": unneeded("the place in the data is a part of each checkpoint"),
        f"{_RUN}use_rollout_manager": unneeded(shared.ENGINE_BATCHES),
        f"{_RUN}data_rerank": unneeded("groups are dealt to ranks by their tokens"),
        f"{_RUN}raw_chat": unneeded("chat messages are read as they are"),
        f"{_RUN}stream_data_loader_type": unneeded(shared.LOADED),
        f"{_RUN}concurrent_setup": unneeded("roles are set up at once"),
        f"{_RUN}bucket_size_mb_in_memory_manager": unneeded("sharding.bucket_mib bounds what a weight sync gathers at once"),
        f"{_RUN}cpu_schedule_strategy": unneeded(shared.GRADED),
        f"{_RUN}policy_to_regroup_queue": unneeded("a group stays together from its prompt to its gradient"),
        f"{_RUN}debug": unneeded("rlcore grpo --debug runs the same job in one process"),
        f"{_RUN}nsys": unneeded(shared.MEASURED),
        f"{_RUN}profiler_dir": unneeded(shared.MEASURED),
        "env_args.**": unneeded(shared.LAUNCHED),
        f"{_TRAINER}kl_coef": to("algorithm.kl_coef", number),
        f"{_TRAINER}entropy_coef": to("algorithm.entropy_coef", number),
        f"{_TRAINER}pos_clip_ratio": to("algorithm.clip_high", number),
        f"{_TRAINER}neg_clip_ratio": to("algorithm.clip_low", number),
        f"{_TRAINER}diff_clip_ratio": to("algorithm.diff_clip", number),
        f"{_TRAINER}final_clip_ratio": to("algorithm.final_clip", number),
        f"{_TRAINER}use_group_sequence_policy": _sequence_ratio,
        f"{_OPTIMIZER}weight_decay": to("optimizer.weight_decay", number),
        f"{_OPTIMIZER}clip_grad": to("optimizer.max_grad_norm", number),
        f"{_TRAINER}seed": to("seed", whole),
        f"{_TRAINER}bf16": lambda value: Mapped({"model.precision": "bf16" if flag(value) else "fp32"}),
        f"{_TRAINER}ulysses_sequence_parallel_size": to("sharding.sequence_parallel", whole),
        f"{_TRAINER}gradient_checkpointing": to("train.gradient_checkpointing", flag),
        f"{_TRAINER}recompute_granularity": _recomputed,
        f"{_TRAINER}free_gpu_memory.offload_weights": if_on("placement.offload", "parameters"),
        f"{_TRAINER}free_gpu_memory.offload_optimizer_states": if_on("placement.offload", "optimizer"),
        f"{_TRAINER}save_hf": unneeded(shared.HF_CHECKPOINT),
        f"{_TRAINER}save*": unneeded("checkpoints go to the run folder, every train.save_every steps"),
        f"{_TRAINER}train_iters": unneeded("train.steps ends the run"),
        f"{_TRAINER}calculate_per_token_loss": only(True, "it always is, or see algorithm.aggregation", "it is"),
        f"{_TRAINER}moe_router_force_load_balancing": only(False, "tokens go to the experts that the router chooses"),
        f"{_TRAINER}groupgemm": _grouped,
        f"{_POLICY}max_prompt_tokens_length": to("data.max_prompt_tokens", whole),
        f"{_POLICY}max_response_tokens_length": to("rollout.max_new_tokens", whole),
        f"{_POLICY}temperature": to("rollout.temperature", number),
        f"{_POLICY}top_p": to("rollout.top_p", number),
        f"{_POLICY}top_k": to("rollout.top_k", top_k),
        f"{_POLICY}presence_penalty": only(0, _ONE_SAMPLE),
        f"{_POLICY}frequency_penalty": only(0, _ONE_SAMPLE),
        f"{_POLICY}repetition_penalty": only(1, _ONE_SAMPLE),
        f"{_POLICY}eval_presence_penalty": only(0, _ONE_SAMPLE),
        f"{_POLICY}eval_frequency_penalty": only(0, _ONE_SAMPLE),
        f"{_POLICY}eval_repetition_penalty": only(1, _ONE_SAMPLE),
        f"{_POLICY}tensor_model_parallel_size": to("rollout.tensor_parallel", whole),
        f"{_POLICY}pipeline_model_parallel_size": only(1, "an engine is split by rollout.tensor_parallel alone", "it is 1"),
        f"{_POLICY}expert_model_parallel_size": only(1, "an engine is split by rollout.tensor_parallel alone", "it is 1"),
        f"{_POLICY}gpu_memory_utilization": to("rollout.options.gpu_memory_utilization", number),
        f"{_POLICY}max_num_batched_tokens": to("rollout.options.max_num_batched_tokens", whole),
        f"{_POLICY}enforce_eager": lambda value: shared.eager(flag(value)),
        f"{_POLICY}free_gpu_memory.offload_weights": if_on("placement.offload", "engine"),
        f"{_POLICY}max_new_tokens": unneeded("max_response_tokens_length is the limit"),
        f"{_POLICY}seq_length": unneeded(shared.LONGEST),
        f"{_POLICY}max_seq_len_to_capture": unneeded("the engine chooses the shapes of its graphs"),
        f"{_POLICY}vllm_*_key": unneeded("columns are the data set's options"),
        f"{_POLICY}is_sync_mode": unneeded(shared.ENGINE_BATCHES),
        f"{_POLICY}enable_stage_resume": unneeded(shared.RESUME),
        "models.*.trust_remote_code": shared.TRUST,
        "models.*.trainable": unneeded("the actor is trained, and nothing else"),
        "models.*.free_gpu_memory.**": unneeded("gradients are kept for the optimizer step only"),
        "models.*.generation_batch_size": unneeded(shared.PACKED),
        "models.*.max_token_in_packing": unneeded(shared.PACKED),
        "models.*.packing": unneeded(shared.PACKED),
        "models.*.variable_seq_lengths": unneeded(shared.PACKED),
        "models.*.seed": unneeded("all seeds follow `seed`"),
        "models.*.bf16": unneeded("all roles compute in model.precision"),
        "models.*.fsdp_size": unneeded("it is the number of devices there too; sharding.replicas makes several copies"),
        "models.*.ulysses_sequence_parallel_size": unneeded("the reference is split as the actor is"),
        "models.*.meta_init": unneeded("each device reads only its own part of the weights"),
        "models.*.groupgemm": unneeded("the actor's holds for all"),
        "models.*.moe_router_force_load_balancing": unneeded("the actor's holds for all"),
        "models.*.use_expandable_segments": unneeded("the backend sets the allocator"),
        "models.*.use_distributed_optimizer": unneeded(shared.SHARDED),
        "models.*.sequence_parallel": unneeded(shared.SHARDED),
        "models.*.*_parallel_size": unneeded(shared.SHARDED),
        "models.*.pipeline_model_parallel_layout": unneeded(shared.SHARDED),
        "models.*.decoder_*_pipeline_num_layers": unneeded(shared.SHARDED),
        "models.*.recompute_*": unneeded("whole layers are recomputed, where train.gradient_checkpointing is on"),
        "models.*.model_provider_module": unneeded("the family is read from the model's config.json"),
        "models.*.tokenizer_*": unneeded("the tokenizer is in the model folder"),
        "models.*.no_load_*": unneeded(shared.RESUME),
        "models.*.finetune": unneeded(shared.RESUME),
        "models.*.log_interval": unneeded("every step is logged"),
        "models.*.empty_unused_memory_level": unneeded("placement.offload says what leaves the device"),
        "models.*.sync_frequency": only(1, "weights are sent to the engine before every step", "it is 1"),
        "models.*.gpu_per_process": unneeded("a worker has one device"),
        "models.*.num_cpu": unneeded(shared.GRADED),
        "models.*.cpu_per_process": unneeded(shared.GRADED),
        "models.*.replica_dp_size": unneeded(shared.SHARDED),
        "models.*.num_replica": unneeded(shared.SHARDED),
        "models.*.enable_thinking": unneeded("models.policy.enable_thinking is what counts"),
        "models.*.max_*_tokens_length": unneeded("those of models.policy are what counts"),
        "models.*.num_inference_per_prompt": unneeded("that of models.policy is what counts"),
        "models.*.seq_length": unneeded(shared.LONGEST),
        "models.*.gradient_checkpointing": unneeded("only the actor has a backward pass"),
        "models.rollout_manager.**": unneeded(shared.ENGINE_BATCHES),
        "models.partial_rollout_manager.**": unneeded("a response is sampled in one step"),
    },
    together=(
        Together((_SAMPLES, _GROUP, _POOLED, _BATCH), _batches),
        Together((f"{_RUN}data_path", f"{_RUN}data_ratio"), _data),
        Together(
            (
                f"{_RUN}eval_data_path", f"{_RUN}eval_episode_interval", f"{_RUN}enable_eval_before_training",
                f"{_POLICY}eval_temperature", f"{_POLICY}eval_top_p", f"{_POLICY}eval_top_k",
            ),
            _evaluation,
        ),
        Together((f"{_RUN}num_episode", f"{_RUN}save_episode_interval"), _saving),
        Together((f"{_RUN}train_backend", f"{_TRAINER}load", f"{_POLICY}load", f"{_REFERENCE}load"), _model),
        Together(
            (
                f"{_TRAINER}packing", f"{_TRAINER}max_token_in_packing", f"{_TRAINER}train_micro_batch_size",
                f"{_RUN}train_micro_batch_size",
            ),
            _microbatches,
        ),
        Together((f"{_RUN}colocation", f"{_TRAINER}num_gpu", f"{_POLICY}num_gpu", f"{_REFERENCE}num_gpu"), _placement),
        Together((f"{_REFERENCE}free_gpu_memory.offload_weights",), _parked_reference),
        Together((f"{_POLICY}enable_thinking", f"{_RUN}model_type"), _thinking),
        Together((f"{_OPTIMIZER}lr", f"{_OPTIMIZER}min_lr"), _rate),
        Together(
            (f"{_OPTIMIZER}adam_beta1", f"{_OPTIMIZER}adam_beta2"),
            lambda given: Mapped({"optimizer.betas": [given(f"{_OPTIMIZER}adam_beta{number_}", number) for number_ in (1, 2)]}),
        ),
    ),
    defaults={
        f"{_RUN}train_backend": "fsdp",
        f"{_RUN}model_type": "llm",
        f"{_RUN}eval_episode_interval": 0,
        f"{_RUN}enable_eval_before_training": False,
        _POOLED: 32,
        _GROUP: 32,
        f"{_TRAINER}packing": False,
        f"{_TRAINER}max_token_in_packing": 32768,
        f"{_TRAINER}gradient_checkpointing": True,
        f"{_TRAINER}kl_coef": 0.0,
        f"{_TRAINER}pos_clip_ratio": 0.2,
        f"{_TRAINER}neg_clip_ratio": 0.2,
        f"{_TRAINER}diff_clip_ratio": 10,
        f"{_TRAINER}final_clip_ratio": 3,
        f"{_OPTIMIZER}lr": 2e-6,
        f"{_OPTIMIZER}weight_decay": 0.01,
        f"{_OPTIMIZER}adam_beta1": 0.9,
        f"{_OPTIMIZER}adam_beta2": 0.95,
        f"{_OPTIMIZER}clip_grad": 1,
        f"{_POLICY}max_prompt_tokens_length": 1024,
        f"{_POLICY}max_response_tokens_length": 2048,
        f"{_POLICY}enable_thinking": False,
        f"{_POLICY}eval_temperature": 0.6,
        f"{_POLICY}eval_top_p": 0.95,
        f"{_POLICY}eval_top_k": 20,
        f"{_POLICY}gpu_memory_utilization": 0.8,
    },
    always=(
        Mapped(
            {"algorithm.advantage_std": "population", "algorithm.advantage_eps": 1e-5},
            "a group's deviation is the population's, plus 1e-5",
        ),
        Mapped({"reward": REWARDS}, "a row is graded by its data_source, and one that is not listed is an error"),
    ),
    required={MODEL: f"{_TRAINER}load", DATA: f"{_RUN}data_path"},
)
