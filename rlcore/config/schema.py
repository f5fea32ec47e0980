"""Schema of the whole run file, and the constraints between its sections."""

from __future__ import annotations

from typing import Any

from pydantic import (
    NonNegativeInt,
    field_serializer,
    field_validator,
    model_validator,
)

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.placement import COMPANIONS, ROLES, PlacementConfig, PoolShape, ShardingConfig, Topology
from rlcore.config.sections import (
    EVERY,
    BackendConfig,
    CriticConfig,
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    Strict,
    TrainConfig,
    VisionConfig,
)


class RunConfig(Strict):
    """One training run. `rlcore show RUN.yaml` prints every value."""

    seed: NonNegativeInt = 0
    model: ModelConfig
    vision: VisionConfig = VisionConfig()
    backend: BackendConfig = BackendConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: dict[str, list[RewardConfig]] = {}
    """Rewards, of which the weighted sum counts; or, for each source of rows (data_source), a list of its own."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig | None = None
    """The value model of algorithm.advantage gae."""
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig | None = None
    """Supervised warm start on the training rows' targets, before `rlcore grpo`'s first step; the settings of `rlcore sft`."""
    dpo: DpoConfig | None = None
    """The settings of `rlcore dpo`."""
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
        replicas = 1 if self.sharding.replicas == "all" else self.sharding.replicas
        copies = replicas * self.sharding.sequence_parallel
        for setting, devices, roles in self.topology.pools:
            parts = {"sharding.replicas x sharding.sequence_parallel": copies} if {"actor", "reference"} & roles else {}
            parts |= {"rollout.tensor_parallel": self.rollout.tensor_parallel} if "rollout" in roles else {}
            for key, part in parts.items():
                if devices % part:
                    raise ValueError(f"{setting}: {devices} devices cannot be split into equal parts of {part} ({key})")
        return self

    @property
    def topology(self) -> Topology:
        """Pools of the run. A role that no pool lists joins its companion's pool."""
        placement = self.placement
        if not placement.pools:
            return Topology((PoolShape("placement.devices", placement.devices, frozenset(ROLES)),))
        listed = {role for pool in placement.pools.values() for role in pool.roles}
        joining = {role: other for role, other in COMPANIONS.items() if role not in listed}
        return Topology(tuple(
            PoolShape(
                f"placement.pools.{name}.devices", pool.devices,
                frozenset(pool.roles) | {role for role, other in joining.items() if other in pool.roles},
            )
            for name, pool in placement.pools.items()
        ))  # fmt: skip

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
        if self.evaluation is None:
            return self
        own = zip(self.data.held_out_sets, self.evaluation_sets.values(), strict=True)
        for key, settings in list(own) or [("evaluation", self.evaluation)]:
            if settings.samples > 1 and settings.temperature == 0:
                key = "evaluation" if settings.samples == self.evaluation.samples else key
                raise ValueError(
                    f"{key}.samples: {settings.samples} greedy responses to a row are one and the same; set temperature above 0"
                )
        if not self.data.eval:
            raise ValueError("evaluation: is set but data.eval names no rows; add data.eval or remove evaluation")
        return self

    @property
    def evaluation_sets(self) -> dict[str, EvaluationConfig]:
        """Settings of each held-out set: its own, or those of the evaluation section, without which there are none."""
        if self.evaluation is None:
            return {}
        shared, own = self.evaluation, EvaluationConfig.model_fields.keys()
        return {
            name: shared.model_copy(update={key: value for key, value in one if key in own and value is not None})
            for name, one in self.data.eval.items()
        }

    @property
    def temperatures(self) -> dict[str, float]:
        """Every sampling temperature, by the setting that gives it."""
        found = {"rollout.temperature": self.rollout.temperature}
        for (key, one), settings in zip(self.data.held_out_sets.items(), self.evaluation_sets.values(), strict=False):
            found["evaluation.temperature" if one.temperature is None else f"{key}.temperature"] = settings.temperature
        return found

    @property
    def rewards(self) -> dict[str, RewardConfig]:
        """Every reward by its key below `reward`."""
        return {
            f"{source}.{index}" if source else f"{index}": reward
            for source, rewards in self.reward.items()
            for index, reward in enumerate(rewards)
        }

    @field_validator("reward", mode="before")
    @classmethod
    def _for_all_or_by_source(cls, value: Any) -> Any:
        return {EVERY: value} if isinstance(value, list) and value else {} if not value else value

    @field_serializer("reward", mode="wrap")
    def _as_for_all_or_by_source(self, value: Any, dump: Any) -> Any:
        dumped = dump(value)
        return dumped[EVERY] if dumped.keys() == {EVERY} else dumped or []

