"""One optimizer step: the gradient of one loss over a whole batch, checked, clipped and applied."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlcore import checkpoint, distributed
from rlcore.config import OptimizerConfig
from rlcore.errors import NonFinite
from rlcore.types import Batch, Metrics, TokenLoss, TokenView

_NAMED = 10  # tokens or parameters that a report names


@dataclass(frozen=True)
class Objective:
    """What an actor minimizes: the sum over tokens of share x loss."""

    loss: Callable[[TokenView], TokenLoss]
    shares: Callable[[Batch], Tensor]  # [N], of the whole optimizer batch over all ranks; 0 where the loss does not count
    unit: Callable[[Batch], float]  # what reported means are means over, on this rank
    whole_groups: bool = False  # the loss of a sample needs the others of its group in the same forward pass


def tokens(batch: Batch) -> float:
    return float(batch.loss_mask.sum())


class Learner:
    """AdamW on the float32 weights of a model that ask for gradients."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.model, self.config, self.total_steps, self.steps = model, config, total_steps, 0
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
        vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
        )

    def step(self, batch: Batch, shares: Tensor, unit: float, losses: Iterable[tuple[Tensor, TokenLoss]]) -> Metrics:
        """`losses`: micro-batch by micro-batch, where its tokens stand in [N], and their loss. NonFinite leaves the weights as
        they were."""
        tally = Tally(unit)
        try:
            for index, result in losses:
                _check_loss(batch, index, result)
                (result.loss * shares[index].to(result.loss.device)).sum().backward()
                tally.add(result)
            distributed.sum_gradients(self.model.parameters())
            norm = self._clip(batch)
        except NonFinite:
            self.optimizer.zero_grad()
            raise
        rate = learning_rate(self.config, self.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return {**tally.metrics(), "grad_norm": norm, "lr": rate}

    def save(self, folder: Path) -> None:
        checkpoint.save_optimizer(self.optimizer, self.steps, folder)

    def load(self, folder: Path) -> None:
        self.steps = checkpoint.load_optimizer(self.optimizer, folder)

    def _clip(self, batch: Batch) -> float:
        """The gradient's norm before it was clipped."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm, error_if_nonfinite=False))
        if not math.isfinite(norm):
            gradients = ((name, parameter.grad) for name, parameter in self.model.named_parameters())
            bad = [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()][:_NAMED]
            prompts = [group.prompt.row.id for group in batch.groups]
            raise NonFinite(
                f"the gradient of this step is not finite (norm {norm}, first in {bad[0] if bad else 'no parameter'}); its"
                f" prompts: {', '.join(prompts)}",
                {"what": "gradient", "norm": str(norm), "parameters": bad, "prompts": prompts},
            )
        return norm


def combined(steps: Sequence[Metrics]) -> Metrics:
    """Of several optimizer steps: the largest of names that end in `max`, the means of the others."""
    values = {name: [step[name] for step in steps if name in step] for name in steps[0]}
    return {name: max(each) if name.endswith("max") else sum(each) / len(each) for name, each in values.items()}


class Tally:
    """Means, maxima and effective sample sizes of one optimizer step, gathered micro-batch by micro-batch."""

    def __init__(self, unit: float) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float, {"unit": unit})
        self.weights: defaultdict[str, float] = defaultdict(float)
        self.highest: dict[str, float] = {}

    def add(self, result: TokenLoss) -> None:
        for name, values in result.means.items():
            self.sums[name] += float(values.detach().sum())
        for name, values in result.maxima.items():
            if len(values):
                self.highest[name] = max(self.highest.get(name, -math.inf), float(values.detach().max()))
        for name, values in result.effective.items():
            values = values.detach().double()
            for kind, part in (("n", len(values)), ("sum", float(values.sum())), ("squares", float(values.square().sum()))):
                self.weights[f"{name} {kind}"] += part

    def metrics(self) -> Metrics:
        sums, weights = distributed.total_counts(self.sums), distributed.total_counts(self.weights)
        unit = max(sums.pop("unit"), 1.0)
        effective = {
            name: weights[f"{name} sum"] ** 2 / (weights[f"{name} n"] * weights[f"{name} squares"])
            for name in {key.rpartition(" ")[0] for key in weights}
            if weights[f"{name} squares"]
        }
        return {name: value / unit for name, value in sums.items()} | effective | distributed.maxima(self.highest)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Of optimizer step 0, 1, ...: rises linearly over the warm-up, then stays, or falls to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(total - 1 - config.warmup_steps, 1))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def _check_loss(batch: Batch, index: Tensor, result: TokenLoss) -> None:
    """NonFinite names the samples whose loss, or anything it is made of, is not a number."""
    quantities: Mapping[str, Tensor] = {"loss": result.loss, **result.means, **result.maxima}
    stacked = torch.stack([values.detach().float() for values in quantities.values()])
    if stacked.isfinite().all():
        return
    wrong = ~stacked.isfinite()
    names = [name for name, row in zip(quantities, wrong, strict=True) if row.any()]
    places = wrong.any(0).nonzero()[:_NAMED, 0].cpu()
    found = [_token(batch, int(index[i]), {name: row[i] for name, row in quantities.items()}) for i in places]
    first = found[0]
    raise NonFinite(
        f"the {names[0]} of this step is not finite ({first[names[0]]}) at token {first['token']} of sample {first['sample']}"
        f" of {first['prompt']}; its log-probability is {first['rollout_logprobs']} in the engine",
        {"what": names, "tokens": found},
    )


def _token(batch: Batch, place: int, quantities: Mapping[str, Tensor]) -> dict[str, Any]:
    """A token of the batch in words."""
    sample = int(batch.sequence[place])
    owners = [(group.prompt.row.id, number) for group in batch.groups for number in range(len(group.samples))]
    start = int(batch.lengths[:sample].sum())
    inputs = {name: getattr(batch, name) for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages")}
    return {
        "prompt": owners[sample][0], "sample": owners[sample][1], "token": place - start,
        "token_id": batch.samples[sample].token_ids[place - start],
        **{name: str(float(values[place])) for name, values in inputs.items() if values is not None},
        **{name: str(float(value.detach())) for name, value in quantities.items()},
    }  # fmt: skip
