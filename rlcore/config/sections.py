"""Sections of the run file: models, data, rollout, rewards, training. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_serializer,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Strict):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The product of the LoRA matrices is scaled by alpha / rank."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Module-name suffixes that get LoRA, or all-linear."""
    sync: Literal["merged", "adapter"] = "merged"
    """Weights sent to the engine: full weights with LoRA merged in, or the LoRA matrices alone."""


class ModelConfig(Strict):
    path: str
    """A Hugging Face folder, or the name of an installed model source (tiny_qwen2_5_vl, smollm2, ...)."""
    options: dict[str, Any] = {}
    """Arguments of the model source."""
    family: str = "auto"
    """The model family; auto reads model_type from the folder's config.json."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; weights and optimizer stay fp32. auto asks the device."""
    groupgemm: bool | None = None
    """Compute a layer's experts by one grouped matrix product, or (false) one by one; unset: grouped where the device can."""
    routing_replay: bool = False
    """Train with the experts that the engine chose while sampling (R3, arXiv 2510.11370)."""
    lora: LoraConfig | None = None
    """Train LoRA weights (arXiv 2106.09685) on a frozen model."""
    freeze: list[str] = []
    """Frozen parts, by name prefix in the saved model; `vision` is the vision tower."""

    @property
    def images_are_read_once(self) -> bool:
        """Whether the vision tower is frozen, so that its embeddings hold for a whole step."""
        return "vision" in self.freeze


class VisionConfig(Strict):
    """Vision encoder: if `model.freeze` names vision, a role of its own that reads each image once per step for all roles."""

    path: str | None = None
    """A model of the same family (folder or source) whose vision tower replaces the policy's."""
    images_per_batch: PositiveInt = 16
    """Images per forward pass of the tower."""
    min_pixels: PositiveInt | None = None
    """Smaller images are enlarged to this many pixels, for trainer and engine alike; unset is the model folder's own limit."""
    max_pixels: PositiveInt | None = None
    """Larger images are reduced to this many pixels, which bounds their tokens (28 x 28 or 32 x 32 pixels each)."""

    @model_validator(mode="after")
    def _some_size_is_allowed(self) -> VisionConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels: {self.min_pixels} is above max_pixels {self.max_pixels}; lower it")
        return self


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
    source: str | None = None
    """Name of its rows in metrics and in reward tables, where they have none of their own; unset is `name`."""


class TrainingSetConfig(DatasetConfig):
    weight: PositiveFloat | None = None
    """In a mixture: its share of the prompts, relative to the other data sets'. Unset everywhere: each row is drawn as often as
    any other."""


class EvaluationSetConfig(DatasetConfig):
    """A held-out set; its settings replace those of the evaluation section."""

    max_new_tokens: PositiveInt | None = None
    temperature: NonNegativeFloat | None = None
    top_p: Fraction | None = None
    top_k: NonNegativeInt | None = None
    samples: PositiveInt | None = None
    passing_score: float | None = None


class DataConfig(Strict):
    train: list[TrainingSetConfig] = []
    """A data set, or a list of them to mix."""
    eval: dict[str, EvaluationSetConfig] = {}
    """A held-out data set, or several by name."""
    system: str | None = None
    """System message of every row that has none."""
    chat_template: str | None = None
    """A .jinja file, or a template, that replaces the model's."""
    chat_template_options: dict[str, Any] = {}
    """Variables of the chat template: enable_thinking, tools, ..."""
    max_prompt_tokens: PositiveInt = 1024
    long_prompts: Literal["drop", "refuse"] = "drop"
    """Rows longer than max_prompt_tokens are dropped and counted, or an error."""
    check: Literal["auto", "all", "drawn"] = "auto"
    """Read and check every row before the run, or each when it is drawn; auto is all for up to 20,000 training rows."""

    @field_validator("train", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else [] if value is None else value

    @field_validator("eval", mode="before")
    @classmethod
    def _one_or_named(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {} if value is None else value
        settings = value.keys() & EvaluationSetConfig.model_fields.keys()
        named = not settings and all(isinstance(part, dict) for part in value.values())
        return value if named else {ONLY: value}

    @field_serializer("train", mode="wrap")
    def _as_one_or_several(self, value: Any, dump: Any) -> Any:
        dumped = dump(value)
        return dumped[0] if len(dumped) == 1 else dumped

    @field_serializer("eval", mode="wrap")
    def _as_one_or_named(self, value: Any, dump: Any) -> Any:
        dumped = dump(value)
        return dumped[ONLY] if dumped.keys() == {ONLY} else dumped

    @property
    def training_sets(self) -> dict[str, TrainingSetConfig]:
        """By key of the run file."""
        single = len(self.train) == 1
        return {"data.train" if single else f"data.train.{number}": one for number, one in enumerate(self.train)}

    @property
    def held_out_sets(self) -> dict[str, EvaluationSetConfig]:
        """By key of the run file."""
        return {"data.eval" if name == ONLY else f"data.eval.{name}": one for name, one in self.eval.items()}

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> DataConfig:
        unset = [number for number, one in enumerate(self.train) if one.weight is None]
        if 0 < len(unset) < len(self.train):
            raise ValueError(f"train.{unset[0]}.weight: must be set, since other data sets of the mixture have one")
        return self

    @model_validator(mode="after")
    def _sets_have_names(self) -> DataConfig:
        for name in self.eval:
            if not name.strip() or (name == ONLY and len(self.eval) > 1):
                raise ValueError(f"eval: {name!r} cannot name one of several held-out sets; give it another name")
        return self

    @model_validator(mode="after")
    def _sources_differ(self) -> DataConfig:
        names = [one.source or one.name for one in self.train]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(
                    f"train.{number}.source: {name!r} is already the source of train.{names.index(name)}; name another, by"
                    " which ids, metrics and rewards tell them apart"
                )
        return self


ONLY = "eval"
"""Name of the only held-out set, where the run file gives it none."""


class SamplingConfig(Strict):
    max_new_tokens: PositiveInt = 256
    temperature: NonNegativeFloat = 1.0
    top_p: Fraction = 1.0
    top_k: NonNegativeInt = 0
    """0 is off."""


class RolloutConfig(SamplingConfig):
    engine: str = "auto"
    """vllm, vllm_server (over HTTP), torch (slow, needs nothing) or any installed engine; auto is the backend's own."""
    options: dict[str, Any] = {}
    """Passed to the engine as they are."""
    tensor_parallel: PositiveInt = 1
    """Devices per engine; a larger pool has several engines."""
    max_mismatch: PositiveFloat = 0.5
    """Warn when the engine's and the actor's log-probabilities of the same tokens differ by more, on average."""

    @model_validator(mode="after")
    def _samples_have_a_distribution(self) -> RolloutConfig:
        if self.temperature == 0:
            raise ValueError("temperature: 0 gives every sample of a group the same text, so no advantage; use a value above 0")
        return self


EVERY = ""
"""Source under which rewards stand that the run file gives to all rows."""


class RewardConfig(Strict):
    name: str
    """An installed reward (math, math_verify, geo3k, ...) or a dotted path such as my_module.my_function."""
    weight: float = 1.0
    options: dict[str, Any] = {}


class OptimizerConfig(Strict):
    lr: PositiveFloat = 1e-6
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from lr / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule between the warm-up and the last optimizer step."""
    min_lr: NonNegativeFloat = 0.0
    """Final learning rate of linear and cosine."""
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
    """Equal, shuffled parts of a step's groups; one optimizer step on each."""
    epochs_per_step: PositiveInt = 1
    """Passes over a step's samples."""
    max_tokens_per_microbatch: PositiveInt = 16384
    """Maximum number of tokens in a forward pass."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    save_every: NonNegativeInt = 0
    """0 saves at the end only."""
    keep_last: PositiveInt | None = None
    """Number of newest checkpoints to keep; unset keeps all."""
    keep_best: str | None = None
    """Metric of the evaluation, for example eval/score/mean, whose best checkpoint is kept besides the last."""

    @model_validator(mode="after")
    def _minibatches_divide_the_prompts(self) -> TrainConfig:
        if self.prompts_per_step % self.minibatches_per_step:
            raise ValueError(
                f"prompts_per_step: {self.prompts_per_step} prompts cannot be split into {self.minibatches_per_step} equal"
                " minibatches; make one a multiple of the other"
            )
        return self


class SftConfig(Strict):
    steps: PositiveInt | None = None
    """Optimizer steps; with epochs too, whichever ends first."""
    epochs: PositiveInt | None = None
    """Passes over the rows, each row once in each; the last step has the rows that are left. Rows that are only found to be too
    long when they are drawn count as well."""
    rows_per_step: PositiveInt = 32
    """Rows of an optimizer step, over all devices."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    log_every: PositiveInt = 10


    @model_validator(mode="after")
    def _it_ends(self) -> SftConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: must be set, or epochs")
        return self


class CriticConfig(Strict):
    path: str | None = None
    """Model to initialize it from; unset is the policy's own."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)


class DpoConfig(Strict):
    steps: PositiveInt
    pairs_per_step: PositiveInt = 16
    beta: PositiveFloat = 0.1
    """Weight of the log-ratio: how strongly the policy is held to the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """For loss sigmoid: the assumed share of pairs with swapped labels."""
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
    """Responses per row; its score is their mean."""
    passing_score: float = 1.0
    """Least score of a right response, for accuracy and pass@k."""
    by: list[str] = ["source", "level"]
    """Columns by whose values accuracy is also reported, where rows have them."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""


class LoggingConfig(Strict):
    tensorboard: bool = True
    samples_on_console: NonNegativeInt = 1
    """Samples of each step shown in full on the console."""
