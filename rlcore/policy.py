"""The actor and the reference: one torch model, packed rows in, log-probabilities or optimizer steps out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlcore import distributed, lora
from rlcore.config import OptimizerConfig
from rlcore.learner import ADAMW, Learner, Objective, Tally, combined
from rlcore.logprob import TILE_BYTES, token_logprobs
from rlcore.packing import Packed, microbatches
from rlcore.precision import WorkingCopy, hold_frozen
from rlcore.protocols import Adapter, NamedTensors
from rlcore.pulse import unwatched
from rlcore.sequence_parallel import Slice
from rlcore.sharding import Sharding, accumulated, at_rest, gathered, read
from rlcore.types import Batch, Metrics, TokenLoss, TokenView


@dataclass(frozen=True)
class ForwardSettings:
    """How a model is run, the same for actor, reference and critic."""

    device: torch.device
    compute_dtype: torch.dtype
    max_tokens: int  # a packed row never holds more
    temperature: float  # log-probabilities are those of logits / temperature, the distribution that was sampled
    sequence: ProcessGroup | None = None  # the ranks that share each packed row; all of them are given the same
    beat: Callable[[], None] = unwatched  # at every packed row
    tile_bytes: int = TILE_BYTES  # of logits at a time


class Forward(nn.Module):
    """One pass over a packed row. Everything that reads weights happens inside it, where sharded ones are whole."""

    def __init__(self, model: nn.Module, adapter: Adapter, settings: ForwardSettings) -> None:
        super().__init__()
        self.model, self.adapter, self.settings = model, adapter, settings

    def forward(self, packed: Packed, entropy: bool = True) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and, unless nobody asks, [M] entropies of the row's targets, float32."""
        self.settings.beat()
        part, sources = Slice(packed.tokens, self.settings.sequence), packed.sources
        hidden = part.at(self.adapter.hidden(self.model, packed, part), sources)
        targets = packed.targets[part.held(sources)].to(self.settings.device)
        head, settings = self.adapter.head(self.model), self.settings
        logprobs, spread = token_logprobs(hidden, head, targets, settings.temperature, settings.tile_bytes, entropy)
        return part.all_of(logprobs, sources), part.all_of(spread, sources)


class TorchReference:
    """A model that gives log-probabilities."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, sharding: Sharding | None = None,
        source: Path | None = None, tower: nn.Module | None = None,
    ) -> None:
        """`sharding` deals the weights over the ranks, which then call everything here together, except those of `tower`, the
        vision encoder's, which stay whole on each. Weights that are only shapes yet come from `source`."""
        self.model, self.adapter, self.settings = model, adapter, settings
        self.forward = Forward(model, adapter, settings)
        hold_frozen(model, settings.compute_dtype)
        if sharding:
            sharding.apply(self.forward, adapter.blocks(model), tower)
        if source:
            read(self.forward, model, adapter.published_name, source, sharding.home if sharding else settings.device)
        self.working = WorkingCopy(self.forward, settings.compute_dtype, made_elsewhere=sharding is not None)

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        result = torch.empty(len(batch.loss_mask))
        with self.working():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = self.forward(packed, entropy=False)[0].cpu()
        at_rest(self.forward)
        return result


@dataclass(frozen=True)
class Passes:
    """How a batch becomes optimizer steps."""

    total_steps: int  # optimizer steps of the whole run, for the learning rate
    minibatches: int = 1
    epochs: int = 1
    seed: int = 0

    def steps(self, batch: Batch, objective: Objective, done: int) -> list[Batch]:
        """Each optimizer step's groups, with each token's share of that step's loss."""
        chosen = [batch.select(share) for share in self.shares(len(batch.groups), done)]
        return [replace(step, shares=objective.shares(step), unit=objective.unit(step)) for step in chosen]

    def shares(self, groups: int, done: int) -> Iterator[Sequence[int]]:
        """The groups of each optimizer step, shuffled anew each epoch; `done` steps came before.

        Shares differ by one group at most, and there are always as many as the learning rate's schedule counts on: where there
        are fewer groups than shares some are empty, and an empty one leaves weights and moments as they are.
        """
        for epoch in range(self.epochs):
            order = list(range(groups))
            if self.minibatches > 1:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + done + epoch * self.minibatches)
                order = torch.randperm(groups, generator=generator).tolist()
            bounds = [groups * number // self.minibatches for number in range(self.minibatches + 1)]
            yield from (order[first:end] for first, end in pairwise(bounds))


class TorchActor(TorchReference):
    """The model that learns."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, objective: Objective, optimizer: OptimizerConfig,
        passes: Passes, publish_additions: bool = False, sharding: Sharding | None = None, source: Path | None = None,
        tower: nn.Module | None = None, adamw: Callable[..., torch.optim.Optimizer] = ADAMW,
    ) -> None:
        """`publish_additions`: `weights` gives the low-rank additions alone."""
        super().__init__(model, adapter, settings, sharding, source, tower)
        self.objective, self.passes, self._publish_additions = objective, passes, publish_additions
        self._sharding = sharding
        self.learner = Learner(model, optimizer, passes.total_steps, adamw)
        self.learner.optimizer.register_step_post_hook(self.working.expire)

    def update(self, batch: Batch) -> Metrics:
        """One optimizer step on each share of the groups."""
        steps = self.passes.steps(batch, self.objective, self.learner.steps)
        return combined([(self.step(step), step.unit) for step in steps])

    def step(self, batch: Batch) -> Tally:
        """One optimizer step, of which `batch` is this rank's part."""
        return self.learner.step(batch, self._losses(batch))

    def weights(self) -> NamedTensors:
        """Every parameter once, under its published name and in the compute dtype, low-rank additions added: a tied head is its
        embedding. No more than a bucket of them is whole at a time."""
        named = lora.additions(self.model) if self._publish_additions else lora.merged(self.model)
        published = ((self.adapter.published_name(name), tensor.to(self.settings.compute_dtype)) for name, tensor in named)
        dealt = self._sharding
        return gathered(published, dealt.bucket_bytes, dealt.exchange) if dealt else gathered(published)

    def save(self, folder: Path) -> None:
        lora.save_merged(self.model, folder / "model")
        lora.save_additions(self.model, folder)
        if distributed.first():
            self.adapter.save_processor(folder / "model")
        self.learner.save(folder)

    def load(self, folder: Path) -> None:
        if lora.has_additions(self.model):
            lora.load_additions(self.model, folder)
        else:
            read(self.forward, self.model, self.adapter.published_name, folder / "model", self.settings.device)
        self.learner.load(folder)

    def _losses(self, batch: Batch) -> Iterator[tuple[Tensor, TokenLoss]]:
        """Micro-batch by micro-batch: the places in [N] of the tokens that count, and their loss."""
        if not batch.unit:
            return
        rows = microbatches(batch, self.settings.max_tokens, self.objective.whole_groups)
        with self.working():
            for packed in accumulated(self.forward, rows, self._sharding):
                logprobs, entropy = self.forward(packed)
                mask = batch.loss_mask[packed.index]
                here = mask.to(logprobs.device)
                index, logprobs, entropy = packed.index[mask], logprobs[here], entropy[here]
                yield index, self.objective.loss(_view(batch, index, logprobs, entropy)) if len(index) else TokenLoss(logprobs)


class AdapterOffReference:
    """The actor's own model without its low-rank additions."""

    def __init__(self, actor: TorchActor) -> None:
        self.actor = actor

    def logprobs(self, batch: Batch) -> Tensor:
        with lora.switched_off(self.actor.model):
            return self.actor.logprobs(batch)


def _view(batch: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor) -> TokenView:
    """The tokens at `index` of the batch."""

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index].to(logprobs.device)

    _, sequence = batch.sequence[index].unique_consecutive(return_inverse=True)
    return TokenView(
        logprobs=logprobs, entropy=entropy, sequence=sequence.to(logprobs.device),
        rollout_logprobs=batch.rollout_logprobs[index].to(logprobs.device), advantages=here(batch.advantages),
        ref_logprobs=here(batch.ref_logprobs), old_logprobs=here(batch.old_logprobs), kl_coef=batch.kl_coef,
    )  # fmt: skip
