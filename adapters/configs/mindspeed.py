"""MindSpeed-RL's run file for language and vision-language models, with the defaults of its config classes."""

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
    all_of,
    if_on,
    only,
    to,
    unneeded,
    unsupported,
)
from rlcore.config.foreign.values import flag, interval, number, numbers, text, texts, top_k, whole

from . import shared
from .shared import CAP, DATA, MODEL

_MEGATRON, _ACTOR, _VISION = "megatron_training.", "actor_config.", "vit_config."
_RL, _ENGINE = "rl_config.", "generate_config."
_SAMPLING = f"{_ENGINE}sampling_config."
_PROMPTS, _GROUP, _BATCH = f"{_MEGATRON}global_batch_size", f"{_RL}n_samples_per_prompt", f"{_RL}mini_batch_size"
_PIXELS = (512 * 512, 2048 * 2048)  # fixed in its data set of images
_VERIFIERS = {"acc": "math", "base_acc": "math", "math_verify_reward": "math_verify"}  # by the name of ours
_DECAY = {"constant": "constant", "linear": "linear", "cosine": "cosine"}


def _batches(given: Given) -> Outcome:
    """Both batch sizes count prompts; the framework multiplies them by the samples of each."""
    prompts, size, batch = given(_PROMPTS, whole), given(_GROUP, whole), given(_BATCH, whole)
    asked = shared.share(given, _BATCH, prompts, batch, f"prompts ({_PROMPTS})")
    steps, fewer = shared.minibatches(prompts, asked)
    arithmetic = (
        f"{prompts} prompts x {size} samples = {prompts * size} samples a step; mini_batch_size {batch} x {size} ="
        f" {batch * size} samples an optimizer step, so {prompts} / {batch} = {asked} optimizer steps"
    )
    settings = {"train.prompts_per_step": prompts, "algorithm.group_size": size, "train.minibatches_per_step": steps}
    return Mapped(settings, shared.notes(arithmetic, fewer))


def _longest(given: Given) -> int:
    return given(f"{_RL}max_prompt_length", whole) + given(f"{_SAMPLING}max_tokens", whole)


def _microbatches(given: Given) -> Outcome:
    if given(f"{_RL}use_dynamic_bsz", flag):
        caps = given(f"{_RL}max_packing_token_size", numbers)
        train = given.get(f"{_RL}update_max_packing_token_size", whole) or int(caps[-1])
        apart = f"the cap of training, {train} tokens, holds for every forward pass (there {int(caps[0])} without gradients)"
        return shared.token_cap(train, _longest(given), apart if len(caps) > 1 and caps[0] != train else "")
    samples = given.get(f"{_ACTOR}micro_batch_size", whole)
    if samples is None:
        return Unneeded(f"{CAP} keeps its default")
    return shared.per_samples(samples, _longest(given))


def _divergence(given: Given) -> Outcome:
    settings: dict[str, Any] = {
        "algorithm.kl_coef": given(f"{_RL}init_kl_coef", number), "algorithm.kl_estimator": given(f"{_RL}kl_penalty", text),
    }  # fmt: skip
    if given(f"{_RL}kl_ctrl_type", text) == "adaptive":
        settings["algorithm.kl_target"] = given(f"{_RL}kl_target", number)
        settings["algorithm.kl_horizon"] = given(f"{_RL}kl_horizon", whole)
    return Mapped(settings)


def _clip(given: Given) -> Outcome:
    low = high = given(f"{_RL}clip_ratio", number)
    if given(f"{_RL}clip_higher_enable", flag):
        low, high = given(f"{_RL}clip_ratio_low", number, low), given(f"{_RL}clip_ratio_high", number, high)
    return Mapped({"algorithm.clip_low": low, "algorithm.clip_high": high})


def _advantage(given: Given) -> Outcome:
    """The estimator; gae has a critic."""
    name = given(f"{_RL}adv_estimator", text)
    if name == "group_norm":
        return Mapped({"algorithm.advantage": "group", "algorithm.advantage_std": "sample", "algorithm.advantage_eps": 1e-6})
    if name == "gae":
        discounts = {"algorithm.gae_gamma": given(f"{_RL}gamma", number), "algorithm.gae_lambda": given(f"{_RL}lam", number)}
        return Mapped({"algorithm.advantage": "gae", "critic": {}, **discounts}, "the critic starts as the policy")
    raise given.error(f"{_RL}adv_estimator", f"must be group_norm or gae; it is {name!r}")


def _rate(given: Given) -> Outcome:
    """Warm-up is a fraction of all optimizer steps, of which an iteration has several."""
    rate, style = given(f"{_ACTOR}lr", number), given(f"{_ACTOR}lr_decay_style", text)
    if style not in _DECAY:
        raise given.error(f"{_ACTOR}lr_decay_style", f"must be one of {', '.join(_DECAY)}; it is {style!r}")
    settings = {"optimizer.lr": rate, "optimizer.schedule": style}
    if style != "constant":
        settings["optimizer.min_lr"] = given(f"{_ACTOR}min_lr", number)
    fraction = given(f"{_ACTOR}lr_warmup_fraction", number)
    if not fraction:
        return Mapped(settings)
    each = given(_PROMPTS, whole) // given(_BATCH, whole)
    steps = given(f"{_MEGATRON}train_iters", whole) * each
    note = f"warm-up is {fraction:g} of {steps} optimizer steps ({each} an iteration)"
    return Mapped(settings | {"optimizer.warmup_steps": round(fraction * steps)}, note)


def _rewards(given: Given) -> Sequence[Outcome]:
    names, weights = given(f"{_RL}verifier_function", texts), given(f"{_RL}verifier_weight", numbers)
    if given(f"{_RL}is_multimodal", flag):
        why = "0.9 for the answer and 0.1 for the format, whatever verifier_function says: what is done there with images"
        return [Mapped({"reward": [{"name": "geo3k"}]}, why)]
    if len(names) != len(weights):
        raise given.error(f"{_RL}verifier_weight", f"{len(weights)} numbers for {len(names)} verifiers")
    ours = [{"name": _VERIFIERS[n], "weight": w} for n, w in zip(names, weights, strict=True) if n in _VERIFIERS]
    missing = [name for name in names if name not in _VERIFIERS]
    note = "1 for a right answer and 0 for any other; `acc` gives -0.5 and -1 there, and base_acc asks for tags too"
    outcomes: list[Outcome] = [Mapped({"reward": ours}, note)] if ours else []
    if missing:
        remedy = "write it as a function and name its dotted path under reward (docs/rewards.md)"
        outcomes.append(Unsupported(f"{', '.join(missing)}: not a reward here; {remedy}"))
    return outcomes


def _vision(given: Given) -> Outcome:
    """Embeddings that are reused are those of a tower that does not learn."""
    if _tower_is_frozen(given):
        return Mapped({"model.freeze": ["vision"]}, "the vision tower does not learn, and each image is encoded once a step")
    return Unneeded("the vision tower is a part of the actor, and learns")


def _tower_is_frozen(given: Given) -> bool:
    return given(f"{_RL}reuse_image_embeds", flag) or given(f"{_RL}colocate_actor_and_vit", flag)


def _images(given: Given) -> Outcome:
    size = given.get(f"{_RL}vit_forward_micro_batch_size", whole) or given.get(f"{_VISION}micro_batch_size", whole)
    return Mapped({"vision.images_per_batch": size}) if size else Unneeded("vision.images_per_batch keeps its default")


def _data(given: Given) -> Outcome:
    """Rows of images are files in verl's layout; text is preprocessed, which none here is."""
    paths = given.get(f"{_MEGATRON}data_path", texts)
    if paths is None:
        return Unneeded("it is not set")
    if given(f"{_RL}is_multimodal", flag):
        low, high = _PIXELS
        note = f"images have {low} to {high} pixels, as its data set has them (512 x 512 to 2048 x 2048)"
        return Mapped({**shared.training_data(paths), "vision.min_pixels": low, "vision.max_pixels": high}, note)
    note = "give the rows themselves (a .parquet or .jsonl file), not the prefix of preprocessed .bin and .idx files"
    return Mapped(shared.training_data(paths), note)


def _placement(given: Given) -> Outcome:
    if not given(f"{_RL}use_integrated_worker", flag):
        return Unsupported("divide the roles among pools: placement.pools (docs/placement.md)")
    parts = {"engine": True, "reference": bool(given(f"{_RL}init_kl_coef", number)), "vision": _tower_is_frozen(given)}
    parked = [part for part, there in parts.items() if there]
    settings: dict[str, Any] = {"placement.kind": "ray", "placement.offload": parked}
    devices = given.get(f"{_RL}actor_resource.num_npus", whole)
    if devices is None:
        return Mapped(settings, "set placement.devices, or start it with examples/launch.sh, which uses every device")
    return Mapped(settings | {"placement.devices": devices})


def _order(value: Any) -> Outcome:
    if not flag(value):
        return Unneeded("rows are shuffled, anew in each pass")
    return Mapped({}, "rows are shuffled here in any case, by `seed`, anew in each pass")


def _minibatch_order(value: Any) -> Outcome:
    if flag(value):
        return Unneeded("a step's groups are shuffled over its optimizer steps")
    return Mapped({}, "a step's groups are shuffled over its optimizer steps in any case, by `seed`")


def _deterministic(value: Any) -> Outcome:
    if not flag(value):
        return Unneeded("it is off")
    return Mapped({"backend.options.deterministic": True}, "an option of the backend of these devices; give it with --backend")


def _resumed(value: Any) -> Outcome:
    if flag(value):
        return Unneeded("a run begins from model.path")
    return Unsupported(shared.FOREIGN_CHECKPOINT)


_MODEL_CODE = (
    "use_fused_rmsnorm", "normalization", "use_mcore_models", "use_flash_attn", "no_masked_softmax_fusion",
    "attention_softmax_in_fp32", "no_gradient_accumulation_fusion", "use_fused_swiglu", "swiglu", "use_fused_rotary_pos_emb",
    "position_embedding_type", "init_method_std", "attention_dropout", "hidden_dropout", "stage", "dataset_additional_keys",
    "distributed_backend", "no_shared_storage", "variable_seq_lengths", "reset_position_ids", "model",
)  # fmt: skip
_COUNTS = ("reward", "adv", "actor_rollout", "actor_update", "actor_logprob", "actor_image_embeds", "ref", "ref_forward", "kl")

TABLE = Table(
    "MindSpeed-RL",
    "grpo",
    keys={
        "model": unneeded("the family is read from the model's config.json"),
        **all_of(
            (f"{_MEGATRON}{key}" for key in _MODEL_CODE),
            unneeded("the model is transformers' own, and its kernels and their precision are the backend's"),
        ),
        f"{_MEGATRON}tokenizer_name_or_path": to(
            MODEL, text, "every role reads the Hugging Face folder, so no weights are converted before or after"
        ),
        f"{_MEGATRON}tokenizer_type": unneeded("the tokenizer is in the model folder"),
        f"{_MEGATRON}train_iters": to("train.steps", whole),
        f"{_MEGATRON}save_interval": to("train.save_every", interval),
        f"{_MEGATRON}seed": to("seed", whole),
        f"{_MEGATRON}bf16": lambda value: Mapped({"model.precision": "bf16" if flag(value) else "fp32"}),
        f"{_MEGATRON}no_shuffle": _order,
        f"{_MEGATRON}use_deter_comp": _deterministic,
        f"{_MEGATRON}npu_deterministic": _deterministic,
        f"{_MEGATRON}split": unneeded("data.train and data.eval are files of their own"),
        f"{_MEGATRON}seq_length": unneeded("data.max_prompt_tokens + rollout.max_new_tokens bound a sample"),
        f"{_MEGATRON}use_distributed_optimizer": unneeded(shared.SHARDED),
        f"{_MEGATRON}sequence_parallel": unneeded(shared.SHARDED),
        f"{_ACTOR}weight_decay": to("optimizer.weight_decay", number),
        f"{_ACTOR}clip_grad": to("optimizer.max_grad_norm", number),
        f"{_ACTOR}finetune": _resumed,
        f"{_ACTOR}load": unneeded("the Hugging Face folder is read instead: model.path"),
        f"{_ACTOR}recompute_granularity": to("train.gradient_checkpointing", lambda value: bool(text(value))),
        f"{_VISION}load": unneeded("the vision tower is read from the model folder; vision.path takes another model's"),
        **all_of(
            (f"{_VISION}{key}" for key in ("model", "no_load_optim", "no_load_rng", "finetune", "*_parallel_size")),
            unneeded("the vision tower is whole on every device, and read from the model folder"),
        ),
        f"{_RL}epochs": to("train.epochs_per_step", whole),
        f"{_RL}entropy_coeff": to("algorithm.entropy_coef", number),
        f"{_RL}max_prompt_length": to("data.max_prompt_tokens", whole),
        f"{_RL}token_level_loss": only(True, "set algorithm.aggregation", "the loss is the mean over tokens"),
        f"{_RL}shuffle_mini_batch": _minibatch_order,
        f"{_RL}use_tensorboard": to("logging.tensorboard", flag),
        f"{_RL}use_wandb": shared.WANDB,
        f"{_RL}use_swanlab": only(False, "there is no SwanLab logger; read metrics.jsonl or TensorBoard"),
        f"{_RL}wandb_*": unneeded(shared.WANDB_NAMES),
        f"{_RL}swanlab_*": unneeded("it is SwanLab's"),
        f"{_RL}rule_reward": only(True, "reward models are not run here; write a reward function", "rewards are rules"),
        f"{_RL}verifier_parallel": unneeded(shared.GRADED),
        f"{_RL}verifier_timeout": unneeded("a grader that may hang has a limit of its own (timeout_seconds of math_verify)"),
        f"{_RL}num_cpus_for_*": unneeded(shared.GRADED),
        f"{_RL}runtime_env_path": unneeded(shared.LAUNCHED),
        f"{_RL}guarantee_order": unneeded(shared.ORDER),
        f"{_RL}blocking": unneeded("stages wait only for what they need"),
        **all_of((f"{_RL}{one}_dispatch_size" for one in _COUNTS), unneeded("a step's groups are split evenly over the ranks")),
        f"{_RL}*_forward_micro_batch_size": unneeded(shared.PACKED),
        f"{_RL}*_max_packing_token_size": unneeded(shared.PACKED),
        f"{_RL}*_dynamic_max_batch_size": unneeded(shared.PACKED),
        f"{_RL}use_remove_padding": unneeded("rows are packed; there is no padding"),
        f"{_RL}use_dp_batch_balance": unneeded("groups are dealt to ranks by their tokens"),
        f"{_RL}log_max_throughput": unneeded(shared.MEASURED),
        f"{_RL}data_strategy": unneeded(shared.ORDER),
        f"{_RL}zmq_communication": unneeded(shared.ORDER),
        f"{_RL}async_engine": unneeded(shared.ENGINE_BATCHES),
        f"{_RL}share_backbone": only(False, "the critic is a model of its own"),
        f"{_RL}integrated_mode_config.ref_model_load_path": unneeded("the reference is model.path as it is before training"),
        f"{_RL}partial_rollout_max_split": only(1, "a response is sampled in one step; leave it out", "it is 1"),
        f"{_RL}multi_turn_*": only(False, "conversations with tools are not sampled here"),
        f"{_RL}overlong_buffer_enable": only(False, "set algorithm.overlong_penalty and algorithm.overlong_share"),
        f"{_RL}overlong_buffer_*": unneeded("overlong_buffer_enable is what counts"),
        f"{_RL}filter_groups_enable": only(False, "set algorithm.max_refills: how often a step draws again"),
        f"{_RL}filter_groups_*": unneeded("filter_groups_enable is what counts"),
        f"{_RL}vit_resource.num_npus": unneeded("the vision tower is on the devices of the engine"),
        f"{_RL}critic_resource.num_npus": unneeded("the critic is on the actor's devices"),
        f"{_RL}*_resource.num_npus": unsupported("divide the roles among pools: placement.pools (docs/placement.md)"),
        f"{_ENGINE}infer_tensor_parallel_size": to("rollout.tensor_parallel", whole),
        f"{_ENGINE}infer_*_parallel_size": only(1, "an engine is split by rollout.tensor_parallel alone", "it is 1"),
        f"{_ENGINE}offload_train_optimizer": if_on("placement.offload", "optimizer"),
        f"{_ENGINE}offload_train_param": if_on("placement.offload", "parameters"),
        f"{_ENGINE}offload_train_grad": unneeded("gradients are kept for the optimizer step only"),
        f"{_ENGINE}max_num_seqs": to("rollout.options.max_num_seqs", whole),
        f"{_ENGINE}max_num_batched_tokens": to("rollout.options.max_num_batched_tokens", whole),
        f"{_ENGINE}gpu_memory_utilization": to("rollout.options.gpu_memory_utilization", number),
        f"{_ENGINE}enable_prefix_caching": to("rollout.options.enable_prefix_caching", flag),
        f"{_ENGINE}enforce_eager": lambda value: shared.eager(flag(value)),
        f"{_ENGINE}max_model_len": unneeded(shared.LONGEST),
        f"{_ENGINE}dtype": unneeded("the engine computes in model.precision"),
        f"{_ENGINE}num_scheduler_steps": unneeded(shared.ENGINE_BATCHES),
        f"{_ENGINE}limit_mm_*_per_prompt": unneeded("the engine takes as many images as the rows have"),
        f"{_ENGINE}trust_remote_code": shared.TRUST,
        f"{_SAMPLING}max_tokens": to("rollout.max_new_tokens", whole),
        f"{_SAMPLING}temperature": to("rollout.temperature", number),
        f"{_SAMPLING}top_p": to("rollout.top_p", number),
        f"{_SAMPLING}top_k": to("rollout.top_k", top_k),
        f"{_SAMPLING}min_p": only(0, "responses are sampled from the model's own distribution; top_p and top_k limit it"),
        f"{_SAMPLING}logprobs": unneeded("every sampled token has its log-probability"),
        f"{_SAMPLING}detokenize": unneeded("rewards read text"),
        f"{_SAMPLING}seed": unneeded("all seeds follow `seed`"),
        f"{_ACTOR}tensor_model_parallel_size": unneeded(shared.SHARDED),
        f"{_ACTOR}*_parallel_size": unneeded(shared.SHARDED),
        f"{_ACTOR}model": unneeded("the family is read from the model's config.json"),
        f"{_ACTOR}save": unneeded(shared.FOLDER),
        f"{_ACTOR}no_load_*": unneeded(shared.RESUME),
        f"{_ACTOR}no_save_*": unneeded("a checkpoint has the optimizer and the random states"),
        f"{_ACTOR}num_workers": unneeded(shared.LOADED),
        f"{_ACTOR}recompute_*": unneeded("whole layers are recomputed, where train.gradient_checkpointing is on"),
        "ref_config.**": unneeded("the reference is model.path as it is before training"),
        "profiler_config.**": unneeded(shared.MEASURED),
        "msprobe_config.**": unneeded(shared.MEASURED),
        "hydra.**": unneeded(shared.FOLDER),
        "defaults": shared.composed,
    },
    together=(
        Together((_PROMPTS, _GROUP, _BATCH), _batches),
        Together(
            (
                f"{_RL}use_dynamic_bsz", f"{_RL}max_packing_token_size", f"{_RL}update_max_packing_token_size",
                f"{_ACTOR}micro_batch_size",
            ),
            _microbatches,
        ),
        Together(
            (
                f"{_RL}init_kl_coef", f"{_RL}kl_penalty", f"{_RL}kl_ctrl_type", f"{_RL}kl_target", f"{_RL}kl_horizon",
            ),
            _divergence,
        ),
        Together(
            (f"{_RL}clip_ratio", f"{_RL}clip_higher_enable", f"{_RL}clip_ratio_low", f"{_RL}clip_ratio_high"), _clip
        ),
        Together((f"{_RL}adv_estimator", f"{_RL}gamma", f"{_RL}lam"), _advantage),
        Together(
            (f"{_ACTOR}lr", f"{_ACTOR}lr_decay_style", f"{_ACTOR}min_lr", f"{_ACTOR}lr_warmup_fraction"), _rate
        ),
        Together(
            (f"{_ACTOR}adam_beta1", f"{_ACTOR}adam_beta2"),
            lambda given: Mapped({"optimizer.betas": [given(f"{_ACTOR}adam_beta{place}", number) for place in (1, 2)]}),
        ),
        Together((f"{_RL}verifier_function", f"{_RL}verifier_weight"), _rewards),
        Together((f"{_RL}reuse_image_embeds", f"{_RL}colocate_actor_and_vit"), _vision),
        Together((f"{_RL}vit_forward_micro_batch_size", f"{_VISION}micro_batch_size"), _images),
        Together((f"{_MEGATRON}data_path", f"{_RL}is_multimodal"), _data),
        Together((f"{_RL}use_integrated_worker", f"{_RL}actor_resource.num_npus"), _placement),
    ),
    defaults={
        f"{_RL}mini_batch_size": 1,
        f"{_RL}n_samples_per_prompt": 1,
        f"{_RL}max_prompt_length": 512,
        f"{_RL}use_dynamic_bsz": False,
        f"{_RL}init_kl_coef": 0.01,
        f"{_RL}kl_penalty": "low_var_kl",
        f"{_RL}kl_ctrl_type": "fixed",
        f"{_RL}kl_target": 100.0,
        f"{_RL}kl_horizon": 1000,
        f"{_RL}clip_ratio": 0.2,
        f"{_RL}clip_higher_enable": False,
        f"{_RL}adv_estimator": "group_norm",
        f"{_RL}gamma": 1.0,
        f"{_RL}lam": 0.95,
        f"{_RL}is_multimodal": False,
        f"{_RL}reuse_image_embeds": False,
        f"{_RL}colocate_actor_and_vit": False,
        f"{_RL}use_integrated_worker": False,
        f"{_RL}verifier_function": ["base_acc"],
        f"{_RL}verifier_weight": [1.0],
        f"{_ACTOR}lr_decay_style": "constant",
        f"{_ACTOR}lr_warmup_fraction": 0.0,
        f"{_ACTOR}min_lr": 0.0,
        f"{_ACTOR}adam_beta1": 0.9,
        f"{_ACTOR}adam_beta2": 0.999,
        f"{_ACTOR}weight_decay": 0.01,
        f"{_ACTOR}clip_grad": 1.0,
        f"{_SAMPLING}max_tokens": 2048,
    },
    required={MODEL: f"{_MEGATRON}tokenizer_name_or_path", DATA: f"{_MEGATRON}data_path"},
)
