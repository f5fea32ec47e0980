"""The actor and the reference: one torch model, packed rows in, log-probabilities or an optimizer step out."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlcore import checkpoint
from rlcore.config import OptimizerConfig
from rlcore.errors import RunError
from rlcore.logprob import token_logprobs
from rlcore.packing import Packed, microbatches
from rlcore.protocols import Adapter, NamedTensors
from rlcore.types import Batch, Metrics, TokenLoss, TokenView

Loss = Callable[[TokenView], TokenLoss]


@dataclass(frozen=True)
class ForwardSettings:
    """How a model is run, the same for actor and reference."""

    device: torch.device
    compute_dtype: torch.dtype
    max_tokens: int  # a packed row never holds more
    temperature: float  # log-probabilities are those of logits / temperature, the distribution that was sampled


class TorchReference:
    """A frozen model that gives log-probabilities."""

    def __init__(self, model: nn.Module, adapter: Adapter, settings: ForwardSettings) -> None:
        self.model, self.adapter, self.settings = model, adapter, settings

    @torch.no_grad()
    def logprobs(self, batch: Batch) -> Tensor:
        result = torch.empty(len(batch.loss_mask))
        with self._autocast():
            for packed in microbatches(batch, self.settings.max_tokens):
                result[packed.index] = self._forward(packed)[0].cpu()
        return result

    def _forward(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """[M] log-probabilities and [M] entropies of the row's targets."""
        device = self.settings.device
        hidden = self.adapter.hidden(self.model, packed)
        return token_logprobs(
            hidden[packed.sources.to(device)], self.adapter.head(self.model), packed.targets.to(device),
            self.settings.temperature, self.settings.compute_dtype,
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = self.settings.compute_dtype
        return torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32)


class TorchActor(TorchReference):
    """The model that learns: AdamW on float32 weights, one loss over the whole optimizer batch."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, settings: ForwardSettings, loss: Loss, optimizer: OptimizerConfig,
        minibatches: int = 1,
    ) -> None:
        super().__init__(model, adapter, settings)
        self.loss, self.config, self.minibatches = loss, optimizer, minibatches
        self.optimizer_steps = 0
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
        vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True,
        )

    def update(self, batch: Batch) -> Metrics:
        """One optimizer step on each of `minibatches` equal shares of the groups; metrics are their means."""
        share = math.ceil(len(batch.groups) / self.minibatches)
        steps = [
            self._step(batch.select(range(first, min(first + share, len(batch.groups)))))
            for first in range(0, len(batch.groups), share)
        ]
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def weights(self) -> NamedTensors:
        """Every parameter once, under its published name: a tied head is its embedding."""
        for name, tensor in self.model.named_parameters():
            yield self.adapter.published_name(name), tensor.detach()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder / "model")
        self.adapter.save_processor(folder / "model")
        checkpoint.save_optimizer(self.optimizer, self.optimizer_steps, folder)

    def load(self, folder: Path) -> None:
        fresh = self.adapter.load(folder / "model", torch.float32).to(self.settings.device)
        self.model.load_state_dict(fresh.state_dict())
        self.optimizer_steps = checkpoint.load_optimizer(self.optimizer, folder)

    def _step(self, batch: Batch) -> Metrics:
        tokens = int(batch.loss_mask.sum())
        tally = Tally(max(tokens, 1))
        if tokens:
            with self._autocast():
                for packed in microbatches(batch, self.settings.max_tokens):
                    self._accumulate(batch, packed, tally)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm, error_if_nonfinite=False)
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise RunError(f"the gradient of this step is not finite (norm {float(norm)}); its prompts: {_rows(batch)}")
        rate = learning_rate(self.config, self.optimizer_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return {**tally.metrics(), "grad_norm": float(norm), "lr": rate}

    def _accumulate(self, batch: Batch, packed: Packed, tally: Tally) -> None:
        """Add this row's share of the gradient of (sum over tokens) / (tokens of the whole optimizer batch)."""
        logprobs, entropy = self._forward(packed)
        mask = batch.loss_mask[packed.index]
        index = packed.index[mask]
        mask = mask.to(logprobs.device)

        def here(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[index].to(logprobs.device)

        view = TokenView(
            logprobs=logprobs[mask], entropy=entropy[mask], rollout_logprobs=batch.rollout_logprobs[index].to(logprobs.device),
            advantages=here(batch.advantages), ref_logprobs=here(batch.ref_logprobs), old_logprobs=here(batch.old_logprobs),
        )
        result = self.loss(view)
        loss = result.loss.sum() / tally.tokens
        if not math.isfinite(float(loss.detach())):
            raise RunError(f"the loss of this step is not finite ({float(loss.detach())}); its prompts: {_rows(batch)}")
        loss.backward()
        tally.add(result)


class Tally:
    """Means and maxima over the tokens of one optimizer step, gathered row by row."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def add(self, result: TokenLoss) -> None:
        for name, values in result.means.items():
            self.sums[name] += float(values.detach().sum())
        for name, values in result.maxima.items():
            if len(values):
                self.maxima[name] = max(self.maxima.get(name, -math.inf), float(values.detach().max()))

    def metrics(self) -> Metrics:
        return {name: total / self.tokens for name, total in self.sums.items()} | self.maxima


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of optimizer step 0, 1, ...: rises linearly over the warm-up, then stays."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def _rows(batch: Batch) -> str:
    return ", ".join(group.prompt.row.id for group in batch.groups)
