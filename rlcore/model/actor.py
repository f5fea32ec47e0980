"""The actor: computes log-probabilities of packed rows and takes optimizer steps on them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcore.algorithms.objective import Objective
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.sections import OptimizerConfig
from rlcore.distributed.fsdp import gathered, read
from rlcore.distributed.parts import Stored, fill, published
from rlcore.distributed.snapshot import Snapshot
from rlcore.model import lora
from rlcore.model.forward import Forward, ForwardSettings
from rlcore.model.loaded import LoadedModel, TrainedModel
from rlcore.model.optimizer import ADAMW, StepStatistics
from rlcore.model.routing import RoutingReplay, RoutingWatch
from rlcore.protocols import ModelFamily
from rlcore.types import Batch, Metrics, NamedTensors, Packed, TokenLoss, TokenView


class TorchActor(TrainedModel):
    """The model under training, with its optimizer."""

    def __init__(
        self, loaded: LoadedModel, settings: ForwardSettings, objective: Objective, optimizer: OptimizerConfig,
        schedule: MinibatchSchedule, adamw: Callable[..., torch.optim.Optimizer] = ADAMW, publish_lora: bool = False,
        routing_replay: bool = False,
    ) -> None:  # fmt: skip
        """`publish_lora`: `weights` yields only the LoRA weights. `routing_replay`: tokens go to the experts of the rollout."""
        forward = Forward(loaded.module, loaded.family, settings)
        super().__init__(forward, loaded, settings, loaded.module, optimizer, schedule, adamw)
        self.objective, self._publish_lora = objective, publish_lora
        self._routing = RoutingWatch(loaded.module, settings.sequence)
        self._routed = RoutingReplay(loaded.module, settings.sequence).over if routing_replay else lambda _: nullcontext()

    def logprobs(self, batch: Batch) -> Tensor:
        return self.run(batch, self._logprobs)

    def step(self, batch: Batch) -> StepStatistics:
        self._routing.begin()
        statistics = super().step(batch)
        statistics.routing = self._routing.end()
        return statistics

    def update(self, batch: Batch) -> Metrics:
        """Take one optimizer step per minibatch of the schedule; returns their combined metrics."""
        return self.stepped(batch, self.objective)

    def weights(self) -> NamedTensors:
        """Yield every parameter once, under its Hugging Face name and in the compute dtype, with LoRA merged; a tied head is
        its embedding. At most one bucket is gathered at a time."""
        named = lora.lora_weights(self.model) if self._publish_lora else lora.merged(self.model)
        served = ((name, tensor.to(self.settings.compute_dtype)) for name, tensor in named)
        sharding = self.loaded.sharding
        whole = gathered(served, sharding.bucket_bytes, sharding.exchange) if sharding else gathered(served)
        return published(whole, self.family.published)

    def save(self, snapshot: Snapshot) -> None:
        """Without LoRA the weights of `model` are the actor's state."""
        publish(self.model, self.family, snapshot)
        if lora.has_lora(self.model):
            snapshot.tensors("lora", lora.lora_weights(self.model))
        self.learner.save(snapshot)

    def load(self, folder: Path) -> None:
        if lora.has_lora(self.model):
            fill(lora.lora_weights(self.model), Stored(folder))
        else:
            read(self.forward, self.model, self.family.published, folder / "model", self.settings.device)
        self.learner.load(folder)

    def _losses(self, batch: Batch) -> Generator[tuple[Tensor, TokenLoss], None, None]:
        """Yield, per micro-batch, the indices in [N] of the tokens that count, and their loss."""
        if not batch.denominator:
            return
        with self.working():
            for packed in self.rows(batch, self.objective.whole_groups):
                mask = batch.loss_mask[packed.index]
                with self._routed(packed):  # until the caller has run the backward pass
                    with self._routing.over(packed, mask):
                        logprobs, entropy = self.forward(packed)
                    here = mask.to(logprobs.device)
                    index, logprobs, entropy = packed.index[mask], logprobs[here], entropy[here]
                    view = _view(batch, index, logprobs, entropy)
                    yield index, self.objective.loss(view) if len(index) else TokenLoss(logprobs)

    def _logprobs(self, packed: Packed) -> Tensor:
        with self._routed(packed):
            return self.forward(packed, entropy=False)[0]


def publish(model: Any, family: ModelFamily, snapshot: Snapshot) -> None:
    """Add `model`, a Hugging Face folder in float32, LoRA merged."""

    def describe(folder: Path) -> None:
        model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
        model.config.save_pretrained(folder / "model")
        family.save_processor(folder / "model")

    snapshot.files(describe)
    snapshot.tensors("model/model", lora.merged(model), torch.float32, family.published)


class LoraOffReference:
    """Reference log-probabilities from the actor's own model with LoRA switched off, and with its own routing."""

    def __init__(self, actor: TorchActor) -> None:
        self.actor = actor

    def logprobs(self, batch: Batch) -> Tensor:
        with lora.switched_off(self.actor.model):
            return self.actor.run(batch, lambda packed: self.actor.forward(packed, entropy=False)[0])


def _view(batch: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor) -> TokenView:
    """Gather the batch's tokens at `index`, on the device of `logprobs`."""

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index].to(logprobs.device)

    _, sequence = batch.sequence[index].unique_consecutive(return_inverse=True)
    return TokenView(
        logprobs=logprobs, entropy=entropy, sequence=sequence.to(logprobs.device),
        rollout_logprobs=batch.rollout_logprobs[index].to(logprobs.device), advantages=here(batch.advantages),
        ref_logprobs=here(batch.ref_logprobs), old_logprobs=here(batch.old_logprobs), kl_coef=batch.kl_coef,
    )  # fmt: skip
