"""The run file: its schema, how it is read, and what is said when it is wrong. Imports nothing heavy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from rlcore.algorithms import LIMITS, PRESETS
from rlcore.errors import ConfigError

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Strict):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The product of the two small matrices counts alpha / rank times."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Layers by the end of their name."""
    sync: Literal["merged", "adapter"] = "merged"
    """What the engine is sent: whole weights with the product added, or the two small matrices alone."""


class ModelConfig(Strict):
    path: str
    """A Hugging Face folder, or the name of an installed model source (tiny_qwen2_5_vl, smollm2, ...)."""
    options: dict[str, Any] = {}
    """Arguments of the model source."""
    adapter: str = "auto"
    """The model family; auto reads model_type from the folder's config.json."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the matrices are multiplied in; weights and optimizer stay fp32. auto asks the device."""
    lora: LoraConfig | None = None
    """Train low-rank additions (arXiv 2106.09685) to weights that stay as they are."""
    freeze: list[str] = []
    """Parts that stay as they are, by the start of their names in the saved model; `vision` is the vision tower."""

    @property
    def images_are_read_once(self) -> bool:
        """What a tower gives holds for a whole step where it does not learn."""
        return "vision" in self.freeze


class VisionConfig(Strict):
    """The vision encoder: where `model.freeze` names vision, a role of its own that reads each image once a step for all."""

    path: str | None = None
    """A model of the same family, a folder or a source, whose vision tower takes the place of the policy's own."""
    images_per_batch: PositiveInt = 16
    """Images that the tower reads at a time."""


class BackendConfig(Strict):
    name: str = "auto"
    options: dict[str, Any] = {}


class DatasetConfig(Strict):
    name: str = "rows"
    """An installed data set (rows is any file by column names), or the dotted path of a function (path, **options) -> rows."""
    path: str | None = None
    """A file, or a folder of files; None where the data set makes its rows."""
    options: dict[str, Any] = {}
    max_rows: PositiveInt | None = None


class DataConfig(Strict):
    train: DatasetConfig
    eval: DatasetConfig | None = None
    max_prompt_tokens: PositiveInt = 1024
    long_prompts: Literal["drop", "refuse"] = "drop"
    """What becomes of rows longer than max_prompt_tokens: dropped and counted, or an error."""


class SamplingConfig(Strict):
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0
    """0 is off."""


class RolloutConfig(SamplingConfig):
    engine: str = "auto"
    """vllm, torch (slow, needs nothing) or any installed engine; auto is the backend's own."""
    options: dict[str, Any] = {}
    """Passed to the engine as they are."""
    tensor_parallel: PositiveInt = 1
    """Devices of one engine; a pool of more has several engines."""
    max_mismatch: PositiveFloat = 0.5
    """Warn when the engine's and the actor's log-probabilities of the same tokens differ by more, on average."""

    @model_validator(mode="after")
    def _samples_have_a_distribution(self) -> RolloutConfig:
        if self.temperature == 0:
            raise ValueError("temperature: 0 gives every sample of a group the same text, so no advantage; use a value above 0")
        return self


class RewardConfig(Strict):
    name: str
    """An installed reward (math, math_verify, geo3k, ...) or a dotted path such as my_module.my_function."""
    weight: float = 1.0
    options: dict[str, Any] = {}


class AlgorithmConfig(Strict):
    name: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++_baseline", "ppo"] = "grpo"
    """Stands for the settings that the paper fixes (rlcore/algorithms); what is set beside it wins."""
    group_size: PositiveInt = 8
    """Samples of one prompt."""
    advantage: Literal["group", "leave_one_out", "batch", "batch_over_group", "gae"] = "group"
    """What a reward is compared with: its group's mean, the others of its group, the whole batch (after its group's mean),
    or what a critic expected."""
    advantage_std: Literal["population", "sample", "none"] = "sample"
    """Of advantage group: divide by the group's standard deviation (ddof 0 or 1), or not at all."""
    advantage_eps: PositiveFloat = 1e-6
    surrogate: Literal["clip", "sequence_clip", "clipped_weight"] = "clip"
    """Clip each token's ratio, the response's ratio, or the weight of a token's log-probability."""
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    diff_clip: PositiveFloat | None = None
    """The log-ratio is at most this (ChatLearn)."""
    final_clip: PositiveFloat | None = None
    """A token's policy loss is at most this, whatever its advantage (ChatLearn). The bound of dual clip (arXiv 1912.09729) is a
    multiple of |advantage| instead."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"
    """How token losses become one: mean over tokens; mean over responses of their mean, sum, or sum over a constant length."""
    aggregation_length: PositiveInt | None = None
    """Of aggregation constant; unset is rollout.max_new_tokens."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["kl", "abs", "mse", "low_var_kl"] = "low_var_kl"
    kl_target: PositiveFloat | None = None
    """Divergence a token that kl_coef is moved towards; unset keeps kl_coef."""
    kl_horizon: PositiveInt = 10_000
    """Samples over which kl_coef follows: a step of as many moves it by all of the error, a fifth at most."""
    entropy_coef: float = 0.0
    correction: Literal["none", "token_tis", "sequence_tis", "icepop", "geometric"] = "none"
    """Of the ratio between trainer and engine: truncated weights by token or response, or tokens or responses left out."""
    correction_low: NonNegativeFloat | None = None
    correction_high: PositiveFloat | None = None
    """Limits of that ratio; unset is what the correction's authors use."""
    mask_truncated: bool = False
    """Leave out responses that ended at max_new_tokens."""
    overlong_penalty: NonNegativeFloat = 0.0
    """Taken from the reward of a response of max_new_tokens; falls to 0 over the last overlong_share of that length."""
    overlong_share: Fraction = 0.2
    max_refills: NonNegativeInt = 0
    """Times a step that groups whose samples all scored the same are replaced by other prompts'."""
    gae_gamma: Fraction = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    value_clip: PositiveFloat = 0.2

    @model_validator(mode="before")
    @classmethod
    def _named_settings(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name, correction = str(values.get("name", "grpo")), str(values.get("correction", "none"))
        limits = dict(zip(("correction_low", "correction_high"), LIMITS.get(correction, ()), strict=False))
        given = {key: value for key, value in values.items() if value is not None or key not in limits}
        return {**limits, **PRESETS.get(name, {}), **given}

    @model_validator(mode="after")
    def _settings_go_together(self) -> AlgorithmConfig:
        compares = self.advantage in ("group", "leave_one_out", "batch_over_group")
        if self.group_size == 1 and compares:
            raise ValueError(
                f"group_size: 1 leaves nothing to compare a sample with under algorithm.advantage {self.advantage}, so every"
                " advantage is 0; use 2 or more"
            )
        if self.max_refills and not compares:
            raise ValueError(
                f"max_refills: {self.max_refills} replaces groups without spread, which algorithm.advantage {self.advantage}"
                " can learn from; set it to 0"
            )
        if self.surrogate == "sequence_clip" and self.kl_in == "reward" and self.kl_coef:
            raise ValueError(
                "kl_in: reward penalizes single tokens, and algorithm.surrogate sequence_clip has one ratio for a whole"
                " response; set algorithm.kl_in=loss"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target: needs an algorithm.kl_coef above 0 to start from")
        low, high = self.correction_low, self.correction_high
        if low is not None and high is not None and low >= high:
            raise ValueError(f"correction_low: {low} is not below algorithm.correction_high {high}; swap or spread them")
        return self


class OptimizerConfig(Strict):
    lr: PositiveFloat = 1e-6
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the rate rises linearly from lr / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does between the warm-up and the last optimizer step."""
    min_lr: NonNegativeFloat = 0.0
    """Where linear and cosine end."""
    max_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _the_rate_falls(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is above lr {self.lr}; lower it")
        return self


class TrainConfig(Strict):
    steps: NonNegativeInt = 100
    prompts_per_step: PositiveInt = 8
    minibatches_per_step: PositiveInt = 1
    """Equal shares of a step's groups, shuffled; an optimizer step on each."""
    epochs_per_step: PositiveInt = 1
    """Passes over a step's samples."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """No forward pass holds more tokens than this."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    save_every: NonNegativeInt = 0
    """0 saves at the end only."""

    @model_validator(mode="after")
    def _minibatches_divide_the_prompts(self) -> TrainConfig:
        if self.prompts_per_step % self.minibatches_per_step:
            raise ValueError(
                f"prompts_per_step: {self.prompts_per_step} prompts cannot be split into {self.minibatches_per_step} equal"
                " minibatches; make one a multiple of the other"
            )
        return self


class SftConfig(Strict):
    steps: PositiveInt
    rows_per_step: PositiveInt = 32
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    log_every: PositiveInt = 10


class CriticConfig(Strict):
    path: str | None = None
    """The model that its weights start from; unset is the policy's own."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)


class DpoConfig(Strict):
    steps: PositiveInt
    pairs_per_step: PositiveInt = 16
    beta: PositiveFloat = 0.1
    """How far the policy may leave the reference: the weight of the log-ratio."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Of loss sigmoid: the share of pairs taken to be labelled the wrong way round."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-7)
    log_every: PositiveInt = 1

    @model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> DpoConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing: {self.label_smoothing} is a part of loss sigmoid, and {self.loss} has none; set it to 0 or"
                " set dpo.loss=sigmoid"
            )
        return self


class EvaluationConfig(SamplingConfig):
    every: NonNegativeInt = 0
    """Steps between evaluations during training; 0 leaves them out."""
    before: bool = True
    at_end: bool = True
    samples: PositiveInt = 1
    """Responses to each row; its score is their mean."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""

    @model_validator(mode="after")
    def _samples_differ(self) -> EvaluationConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy responses to a row are one and the same; set temperature above 0")
        return self


class ShardingConfig(Strict):
    """How the devices of a pool share a model that is trained or compared with."""

    replicas: PositiveInt = 1
    """Copies of the model; the devices of each copy hold a part of it."""
    sequence_parallel: PositiveInt = 1
    """Devices that work on one packed row together (arXiv 2309.14509)."""
    cpu_offload: bool = False
    """Weights, gradients and optimizer rest in host memory."""
    gradient_sync: Literal["last", "each"] = "last"
    """Sum gradients once an optimizer step, which keeps them whole on each device until then, or after each micro-batch."""
    meta_init: bool = True
    """Each device reads its own part of the weight files, so that a machine never holds a copy of the model a device."""
    bucket_mib: PositiveInt = 512
    """Of weights that are gathered at once on their way to an engine."""


COMPANIONS = {"reference": "actor", "vision": "rollout"}
"""Where a role is that no pool lists."""


class PoolConfig(Strict):
    """Identical workers, one a device."""

    roles: list[Literal["actor", "reference", "rollout", "vision"]]
    """The critic goes with the actor; where no pool lists them, the reference does too, and the vision encoder goes with the
    rollout."""
    devices: PositiveInt = 1


class PlacementConfig(Strict):
    kind: str = "local"
    """local is this process; ray, worker processes on one node or many; or any installed placement."""
    devices: PositiveInt = 1
    """Of one pool that hosts every role."""
    pools: dict[str, PoolConfig] = {}
    """Several pools by name, each role in one of them, instead of devices."""
    reward_workers: NonNegativeInt = 0
    """Processes without a device that score samples while engines go on; 0 scores in the controller."""
    max_staleness: Literal[0, 1] = 0
    """1 samples the next step while this one updates, with the weights of before."""
    offload: list[Literal["parameters", "optimizer", "reference", "engine", "vision"]] = []
    """What leaves the device, to host memory, while others need the room: the actor's weights, its moments, the reference, the
    engine's cache, the vision encoder."""
    max_restarts: NonNegativeInt = 0
    """Times that a run whose worker died goes on from its last checkpoint by itself."""
    stall_seconds: NonNegativeFloat = 1800.0
    """The run ends, with a report, when nothing has moved for this long: no stage, packed row or engine step; 0 is never."""
    options: dict[str, Any] = {}
    """Arguments of the placement."""

    @model_validator(mode="after")
    def _each_role_has_one_place(self) -> PlacementConfig:
        owners: dict[str, str] = {}
        for name, pool in self.pools.items():
            for role in pool.roles:
                if role in owners:
                    raise ValueError(f"pools.{name}.roles: {role} is already in the pool {owners[role]!r}; list each role once")
                owners[role] = name
        if self.pools and (missing := [role for role in ("actor", "rollout") if role not in owners]):
            raise ValueError(f"pools: no pool has the role {missing[0]}; add it to one")
        if self.pools and self.devices != 1:
            raise ValueError("devices: each pool says its own; remove one of placement.devices and placement.pools")
        if self.kind == "local" and (self.pools or self.devices > 1):
            raise ValueError("kind: local is one process on one device; set placement.kind=ray for more, or for several pools")
        if self.kind == "local" and self.reward_workers:
            raise ValueError(f"reward_workers: {self.reward_workers} need placement.kind=ray; set it, or remove them")
        if self.max_staleness and not self.apart:
            raise ValueError("max_staleness: 1 needs actor and rollout in different pools, so that both can work at a time")
        return self

    @property
    def apart(self) -> bool:
        """Whether samples are drawn on other devices than those that train."""
        return not any({"actor", "rollout"} <= set(pool.roles) for pool in self.pools.values()) and bool(self.pools)


class LoggingConfig(Strict):
    tensorboard: bool = True
    samples_on_console: NonNegativeInt = 1
    """Samples of each step shown in full on the console."""


class RunConfig(Strict):
    """One training run. `rlcore show RUN.yaml` prints every value."""

    seed: NonNegativeInt = 0
    model: ModelConfig
    vision: VisionConfig = VisionConfig()
    backend: BackendConfig = BackendConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: list[RewardConfig] = []
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig | None = None
    """The value model of algorithm.advantage gae."""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig | None = None
    """Supervised warm start on the training rows' targets, before the first step of `rlcore grpo`; all of `rlcore sft`."""
    dpo: DpoConfig | None = None
    """All of `rlcore dpo`."""
    evaluation: EvaluationConfig | None = None
    logging: LoggingConfig = LoggingConfig()
    placement: PlacementConfig = PlacementConfig()
    sharding: ShardingConfig = ShardingConfig()

    @model_validator(mode="after")
    def _one_sample_fits_a_microbatch(self) -> RunConfig:
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.train.max_tokens_per_microbatch:
            raise ValueError(
                f"train.max_tokens_per_microbatch: {self.train.max_tokens_per_microbatch} cannot hold one sample of up to"
                f" {longest} tokens (data.max_prompt_tokens {self.data.max_prompt_tokens} + rollout.max_new_tokens"
                f" {self.rollout.max_new_tokens}); raise it to at least {longest} or lower the other two"
            )
        return self

    @model_validator(mode="after")
    def _sections_go_together(self) -> RunConfig:
        algorithm, rollout, lora = self.algorithm, self.rollout, self.model.lora
        if lora is not None and lora.sync == "adapter" and self.sft is not None:
            raise ValueError(
                "model.lora.sync: adapter sends the engine no other weights, and the warm start (sft) makes others; set"
                " model.lora.sync=merged or remove sft"
            )
        if algorithm.advantage == "gae" and self.critic is None:
            raise ValueError(
                "critic: algorithm.advantage gae needs a value model; add the section (critic: {}) or choose another advantage"
            )
        if self.critic is not None and algorithm.advantage != "gae":
            raise ValueError(f"critic: algorithm.advantage {algorithm.advantage} asks no critic; remove the section or set gae")
        if algorithm.correction != "none" and (rollout.top_p < 1 or rollout.top_k):
            key = f"rollout.top_p {rollout.top_p}" if rollout.top_p < 1 else f"rollout.top_k {rollout.top_k}"
            raise ValueError(
                f"algorithm.correction: {algorithm.correction} compares log-probabilities, and under {key} the engine's are of"
                " another distribution than the trainer's; sample from the whole one or set algorithm.correction=none"
            )
        return self

    @model_validator(mode="after")
    def _devices_divide(self) -> RunConfig:
        copies = self.sharding.replicas * self.sharding.sequence_parallel
        for name, devices, roles in self.pools():
            parts = {"sharding.replicas x sharding.sequence_parallel": copies} if {"actor", "reference"} & roles else {}
            parts |= {"rollout.tensor_parallel": self.rollout.tensor_parallel} if "rollout" in roles else {}
            for key, part in parts.items():
                if devices % part:
                    raise ValueError(f"{name}: {devices} devices cannot be split into equal parts of {part} ({key})")
        return self

    def pools(self) -> list[tuple[str, int, set[str]]]:
        """Every pool's setting, devices and roles. A role that no pool lists goes with another."""
        placement = self.placement
        if not placement.pools:
            return [("placement.devices", placement.devices, {"actor", *COMPANIONS, "rollout"})]
        listed = {role for pool in placement.pools.values() for role in pool.roles}
        return [
            (
                f"placement.pools.{name}.devices", pool.devices,
                {*pool.roles, *(role for role, other in COMPANIONS.items() if role not in listed and other in pool.roles)},
            )
            for name, pool in placement.pools.items()
        ]  # fmt: skip

    @model_validator(mode="after")
    def _one_tower_reads_for_all(self) -> RunConfig:
        once, critic = self.model.images_are_read_once, self.critic
        if self.vision.path is not None and not once:
            raise ValueError(
                "vision.path: a vision tower from elsewhere stands beside the actor and does not learn with it; add vision to"
                " model.freeze or remove vision.path"
            )
        if once and critic is not None and critic.path is not None:
            raise ValueError(
                f"critic.path: under model.freeze [vision] the critic is given images as the policy's vision tower reads them,"
                f" and {critic.path} has a tower of its own; remove critic.path or let vision learn"
            )
        for name, pool in self.placement.pools.items():
            if "vision" in pool.roles and not once:
                raise ValueError(
                    f"placement.pools.{name}.roles: a vision tower that learns is a part of the actor; add vision to"
                    " model.freeze or remove it here"
                )
        return self

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> RunConfig:
        if self.evaluation is not None and self.data.eval is None:
            raise ValueError("evaluation: is set but data.eval names no rows; add data.eval or remove evaluation")
        return self


class _KeyTwice(Exception):
    """`LINE: 'key' is already set on line LINE`."""


class _EachKeyOnce(yaml.SafeLoader):
    """YAML, which would keep the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _KeyTwice(f"{line}: {key.value!r} is already set on line {lines[key.value]}; remove one")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with `a.b=value` overrides (values are YAML); ConfigError says which key is wrong and why."""
    return validate(RunConfig, read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the file and the overrides say, not yet checked."""
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except _KeyTwice as twice:
        raise ConfigError(f"{path}:{twice}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = _kind(values)
        raise ConfigError(f"{path}: a run file is a mapping of settings (model:, data:, reward:, ...), this holds {found}")
    for override in overrides:
        values = _override(values, override)
    return values


def validate(schema: type[Strict] | type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Any:
    """`values` as `schema`, or one ConfigError with a line for each wrong key, each with its full name."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, prefix, detail) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump(config: RunConfig) -> str:
    """Every setting as YAML, in the order of the schema; reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or what there is."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are: {', '.join(names)}" if names else ""


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ConfigError(f"{override!r}: an override is a.b=value, for example train.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from None
    return _with(values, key.split("."), value, key)


def _with(values: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """`values` with the entry at `path` replaced; list entries are named by their index."""
    head, *rest = path
    if isinstance(values, list):
        if not head.isdigit() or int(head) >= len(values):
            raise ConfigError(f"{key}: {head!r} is not an entry of this list of {len(values)}")
        index = int(head)
        return [*values[:index], _with(values[index], rest, value, key) if rest else value, *values[index + 1 :]]
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {head!r} stands below a plain value ({values!r}), not below a section")
    return {**values, head: _with(values.get(head), rest, value, key) if rest else value}


def _explain(schema: type[BaseModel], prefix: str, detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = prefix + ".".join(location)
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{key}: no such setting{nearest(location[-1], _fields(schema, location[:-1]))}"
    if kind == "missing":
        return f"{key}: must be set"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{key}.{message}" if key else message
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}; it is {_kind(given)}"


def _fields(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The settings of the section at `path`."""
    for name in path:
        if name.isdigit():
            continue
        annotation = schema.model_fields[name].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        schema = next(part for part in candidates if isinstance(part, type) and issubclass(part, BaseModel))
    return list(schema.model_fields)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return f"{value!r}" if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
