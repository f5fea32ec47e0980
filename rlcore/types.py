"""The data that roles exchange. Frozen: a role returns new data, it never edits what it was given.

Legend: P tokens of a prompt, R tokens of a response, S samples of a batch, N response tokens of a batch,
T tokens of a packed row, I images of a prompt, L layers with experts, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlcore.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

Metrics = dict[str, float]
NamedTensors = Iterable[tuple[str, Tensor]]  # Hugging Face names, whole tensors, one at a time
Vision = Mapping[str, Tensor]  # image_grid_thw [I, 3] and pixel_values or, once embedded, image_embeds [tokens, ...]
_TOKEN_FIELDS = (
    "rollout_logprobs",
    "loss_mask",
    "advantages",
    "ref_logprobs",
    "old_logprobs",
    "values",
    "returns",
    "loss_weights",
)


@dataclass(frozen=True)
class Row:
    """One row of a data set, not yet encoded for a model."""

    id: str  # unique within the data set; error messages and samples.jsonl name it
    messages: Sequence[Mapping[str, Any]]  # chat messages; content is text or a list of {type: image} / {type: text, text}
    answer: str = ""  # what the reward compares with
    target: str | None = None  # the whole response to imitate, or the preferred one of a pair
    rest: Sequence[Mapping[str, Any]] = ()  # chat messages after the target; the assistant's are imitated too
    rejected: str | None = None  # the other of the pair
    images: Sequence[Image] = ()  # RGB, in the order of the image parts of messages and rest
    fields: Mapping[str, Any] = field(default_factory=dict)  # the other columns, handed to the reward
    source: str = ""  # the data set it is from, by which rewards and metrics tell rows apart


@dataclass(frozen=True)
class Prompt:
    """A row encoded for one model."""

    row: Row
    token_ids: list[int]  # P, every image placeholder expanded to one token per merged patch
    engine_token_ids: list[int]  # token_ids with one placeholder per image: engines expand it themselves
    vision: Vision | None = None  # the images
    position_ids: Tensor | None = None  # [3, P] where a family has multi-axis positions; None is 0..P-1
    text: str = ""  # the chat template's output before tokenization, up to the assistant's answer
    imitated: NDArray[np.int64] | None = None  # [R] where it is a whole conversation: indices in it of the only sample's tokens

    def for_models(self) -> Prompt:
        """Copy without fields that only rewards and records read. Images are kept until they are embedded."""
        read = self.vision is not None and "image_embeds" in self.vision
        return replace(self, row=Row(self.row.id, (), images=() if read else self.row.images))

    def for_rewards(self) -> Prompt:
        """Copy without fields that only models read: images and positions."""
        return replace(self, row=replace(self.row, images=()), vision=None, position_ids=None)

    @property
    def next_position(self) -> int:
        """The position of the first response token."""
        return len(self.token_ids) if self.position_ids is None else int(self.position_ids.max()) + 1


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. The seed makes a call repeatable whatever was drawn before it."""

    samples: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    seed: int = 0
    first: int = 0  # global index of the first prompt, where a call has only part of all prompts


@dataclass(frozen=True, eq=False)
class Sample:
    """One response. Its log-probabilities are the engine's own, under the distribution it drew from."""

    token_ids: NDArray[np.int32]  # [R], at least 1; ends with the end-of-turn token when finish is "stop"
    logprobs: NDArray[np.float32]  # [R]
    text: str
    finish: Literal["stop", "length"]
    policy_version: int
    experts: NDArray[np.integer] | None = None  # [P + R - 1, L, k]: where the engine's routers sent each token that it read

    def __post_init__(self) -> None:
        """Convert sequences of numbers to arrays."""
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", np.asarray(self.logprobs, np.float32))


@dataclass(frozen=True, eq=False)
class Group:
    """A prompt and its samples: the unit from sampling to the gradient."""

    prompt: Prompt
    samples: Sequence[Sample]

    def for_models(self) -> Group:
        """Copy without fields that only rewards and records read."""
        row = Row(self.prompt.row.id, ())
        return Group(replace(self.prompt, row=row), [replace(sample, text="") for sample in self.samples])


@dataclass(frozen=True)
class Score:
    """A reward's result for one sample. Only status "value" has a value: a failure is never a 0."""

    value: float | None
    status: Literal["value", "timeout", "error"] = "value"
    parts: Mapping[str, float] = field(default_factory=dict)  # unweighted, by reward name
    detail: str = ""  # the error


@dataclass(frozen=True)
class Batch:
    """Groups as tensors. Token fields are in packed order: group by group, sample by sample, token by token."""

    groups: Sequence[Group]
    rollout_logprobs: Tensor  # [N] float32
    loss_mask: Tensor  # [N] bool, True where the loss counts
    advantages: Tensor | None = None  # [N] float32
    ref_logprobs: Tensor | None = None  # [N] float32
    old_logprobs: Tensor | None = None  # [N] float32; None is "the actor's own, detached"
    values: Tensor | None = None  # [N] float32, the critic's before this step's updates
    returns: Tensor | None = None  # [N] float32, the critic's targets
    kl_coef: float = 0.0  # of this step
    loss_weights: Tensor | None = None  # [N] float32, over an optimizer step's whole batch; 0 where the loss does not count
    denominator: float = 0.0  # denominator of that step's reported means, over all ranks together
    rows: int = 0  # minimum of forward passes, equal on every rank

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Batch:
        """Build a batch; RunError when an engine gave log-probabilities or experts for another number of tokens."""
        for group in groups:
            for sample in group.samples:
                read = len(group.prompt.token_ids) + len(sample.token_ids) - 1
                if sample.experts is not None and len(sample.experts) != read:
                    raise RunError(
                        f"{group.prompt.row.id}: the engine gave the experts of {len(sample.experts)} tokens, it read {read}"
                    )
                if len(sample.logprobs) != len(sample.token_ids):
                    raise RunError(
                        f"{group.prompt.row.id}: the engine gave {len(sample.logprobs)} log-probabilities for"
                        f" {len(sample.token_ids)} tokens; training needs one for each"
                    )
        logprobs = [sample.logprobs for group in groups for sample in group.samples]
        rollout_logprobs = torch.from_numpy(np.concatenate(logprobs)) if logprobs else torch.empty(0)
        return cls(groups, rollout_logprobs, torch.ones(len(rollout_logprobs), dtype=torch.bool))

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    @cached_property
    def lengths(self) -> Tensor:
        """[S] response tokens of each sample."""
        return torch.tensor([len(sample.token_ids) for sample in self.samples], dtype=torch.int64)

    @cached_property
    def sequence(self) -> Tensor:
        """[N]: index of the sample that each token belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @cached_property
    def sizes(self) -> list[int]:
        """Response tokens of each group."""
        return [sum(len(sample.token_ids) for sample in group.samples) for group in self.groups]

    @cached_property
    def starts(self) -> list[list[int]]:
        """Start in [N] of the tokens of each group's samples."""
        first = self.lengths.cumsum(0) - self.lengths
        return [starts.tolist() for starts in first.split([len(group.samples) for group in self.groups])]

    def places(self, chosen: Sequence[int]) -> Tensor:
        """Indices in [N] of the chosen groups' tokens, in that order."""
        ends = list(accumulate(self.sizes))
        ranges = [torch.arange(ends[index] - self.sizes[index], ends[index]) for index in chosen]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def select(self, chosen: Sequence[int]) -> Batch:
        """The chosen groups, in that order, with their tokens."""
        if list(chosen) == list(range(len(self.groups))):
            return self
        cut = {name: self._of(value, chosen) for name in _TOKEN_FIELDS if (value := getattr(self, name)) is not None}
        return replace(self, groups=[self.groups[index] for index in chosen], **cut)

    def _of(self, per_token: Tensor, chosen: Sequence[int]) -> Tensor:
        """[N] -> the tokens of the chosen groups."""
        parts = per_token.split(self.sizes)
        return torch.cat([parts[index] for index in chosen]) if chosen else per_token[:0]

    def per_token(self, per_sample: Tensor) -> Tensor:
        """[S] -> [N], each sample's value on each of its tokens."""
        return per_sample.repeat_interleave(self.lengths)

    def sample_values(self, per_token: Tensor) -> list[float]:
        """[N] -> S, the mean over each sample's tokens."""
        sums = torch.zeros(len(self.lengths), dtype=torch.float64).index_add(0, self.sequence, per_token.double())
        return (sums / self.lengths).tolist()


@dataclass(frozen=True)
class AdvantageInputs:
    """Inputs of advantage estimation: S responses and their rewards. Converted to float64."""

    rewards: Tensor  # [S] float64; 0 where invalid
    valid: Tensor  # [S] bool
    groups: Tensor  # [S] int64, index of each response's group
    lengths: Tensor  # [S] int64
    penalties: Tensor  # [N] float64, subtracted from the reward per token: kl_coef x divergence
    values: Tensor | None = None  # [N] float64, the critic's

    def __post_init__(self) -> None:
        for name in ("rewards", "penalties", "values"):
            if (numbers := getattr(self, name)) is not None:
                object.__setattr__(self, name, numbers.double())

    @cached_property
    def sequence(self) -> Tensor:
        """[N]: index of the response that each token belongs to."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    def compared(self) -> Iterator[Tensor]:
        """Yield a mask [S] bool for each group: its valid responses."""
        return ((self.groups == group) & self.valid for group in self.groups.unique())

    @property
    def penalized(self) -> Tensor:
        """[S] float64: rewards minus the penalties of all tokens."""
        return self.rewards.index_add(0, self.sequence, -self.penalties)


@dataclass(frozen=True)
class Receipt:
    """Proof of a weight update: what the engine holds is what the actor sent."""

    version: int
    tensors: int
    bytes: int
    seconds: float
    check_seconds: float  # the part spent on fingerprints


@dataclass(frozen=True)
class TokenView:
    """Inputs of a loss for one micro-batch: M response tokens that count, float32. A response is never split."""

    logprobs: Tensor  # [M], with gradient
    entropy: Tensor  # [M], with gradient
    sequence: Tensor  # [M] int64, non-decreasing: index of the response in the micro-batch
    rollout_logprobs: Tensor  # [M]
    advantages: Tensor | None = None  # [M]
    ref_logprobs: Tensor | None = None  # [M]
    old_logprobs: Tensor | None = None  # [M]; None is "logprobs, detached"
    kl_coef: float = 0.0


@dataclass(frozen=True)
class ValueView:
    """Inputs of a critic's loss for one micro-batch."""

    values: Tensor  # [M], with gradient
    old_values: Tensor  # [M]
    returns: Tensor  # [M]


@dataclass(frozen=True)
class TokenLoss:
    """Per-token loss, and metrics over all tokens of the optimizer step: means, maxima, and effective sample sizes of weights
    as fractions, (sum w)^2 / (M sum w^2)."""

    loss: Tensor  # [M]
    means: Mapping[str, Tensor] = field(default_factory=dict)  # [M] each
    maxima: Mapping[str, Tensor] = field(default_factory=dict)  # [M] each
    effective: Mapping[str, Tensor] = field(default_factory=dict)  # [M] each


@dataclass(frozen=True)
class Segment:
    """Extent of one group in a packed row: `prompt` tokens from `start`, then each response's input tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Packed:
    """A packed row: one forward pass, which gives the log-probabilities of M target tokens."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, or [3, T] where the family has multi-axis positions
    segments: tuple[Segment, ...]
    predictors: Tensor  # [M] int64, index in T of the hidden state that predicts the target
    targets: Tensor  # [M] int64
    index: Tensor  # [M] int64, index of the target in the batch's [N]
    names: Sequence[str]  # the row of each segment
    vision: Sequence[Vision | None]  # the images of each segment
    experts: Tensor | None = None  # [T, L, k] integers: where the engine sent each token, in each layer with experts

    @property
    def tokens(self) -> int:
        return len(self.input_ids)
