"""One optimizer step: the gradient of one loss over a whole batch, checked, clipped and applied."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlcore.checkpoint.tensors import load_optimizer, save_optimizer
from rlcore.config.sections import OptimizerConfig
from rlcore.distributed import world
from rlcore.distributed.snapshot import Snapshot
from rlcore.errors import NonFinite
from rlcore.model.routing import RoutingStatistics
from rlcore.types import Batch, Metrics, TokenLoss

ADAMW = partial(torch.optim.AdamW, fused=True)
_NAMED = 10  # most tokens or parameters named in an error


class Learner:
    """AdamW on the trainable float32 weights of a model."""

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, total_steps: int, adamw: Callable[..., torch.optim.Optimizer] = ADAMW
    ) -> None:
        self.model, self.config, self.total_steps, self.steps = model, config, total_steps, 0
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
        vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = adamw(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps
        )

    def step(self, batch: Batch, losses: Iterable[tuple[Tensor, TokenLoss]]) -> StepStatistics:
        """`losses`: per micro-batch, the indices of its tokens in [N], and their loss. NonFinite is raised on every rank and
        leaves the weights unchanged."""
        statistics, wrong = StepStatistics(), None
        for index, result in losses:
            wrong = wrong or _loss_fault(batch, index, result)
            assert batch.loss_weights is not None, "MinibatchSchedule.steps sets them"
            (result.loss * batch.loss_weights[index].to(result.loss.device)).sum().backward()
            statistics.add(result)
        norm = world.whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)).item()
        try:
            world.agree(wrong)
            world.agree(None if math.isfinite(norm) else self._gradient_fault(batch, norm))
        except NonFinite:
            self.optimizer.zero_grad()
            raise
        rate = learning_rate(self.config, self.steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        statistics.common = {"grad_norm": norm, "lr": rate}
        return statistics

    def save(self, snapshot: Snapshot, folder: str = "") -> None:
        save_optimizer(self.optimizer, self.steps, snapshot, folder)

    def load(self, folder: Path) -> None:
        self.steps = load_optimizer(self.optimizer, folder)

    def _gradient_fault(self, batch: Batch, norm: float) -> NonFinite:
        gradients = ((name, parameter.grad) for name, parameter in self.model.named_parameters())
        bad = [name for name, one in gradients if one is not None and not world.part(one).isfinite().all()][:_NAMED]
        prompts = [group.prompt.row.id for group in batch.groups]
        return NonFinite(
            f"the gradient of this step is not finite (norm {norm}, first in {bad[0] if bad else 'no parameter'}); its"
            f" prompts: {', '.join(prompts)}",
            {"what": "gradient", "norm": str(norm), "parameters": bad, "prompts": prompts},
        )


def combined(steps: Sequence[tuple[StepStatistics, float]]) -> Metrics:
    """Merge optimizer steps, each with its denominator: means, maxima and effective sample sizes over all their tokens, so that
    a quantity that updates do not change is independent of the number of minibatches; `grad_norm` is the mean over the steps
    with a nonzero denominator, `lr` that of the last."""
    total = StepStatistics()
    for statistics, _ in steps:
        total += statistics
    norms = [statistics.common["grad_norm"] for statistics, denominator in steps if denominator] or [0.0]
    last = steps[-1][0].common["lr"]
    return total.metrics(sum(denominator for _, denominator in steps)) | {"grad_norm": sum(norms) / len(norms), "lr": last}


class StepStatistics:
    """Metrics of one optimizer step, accumulated over micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.weights: defaultdict[str, float] = defaultdict(float)  # n, sum, sum of squares per effective sample size
        self.highest: dict[str, float] = {}
        self.routing: RoutingStatistics | None = None  # of a mixture of experts
        self.common: Metrics = {}  # identical on every rank

    def add(self, result: TokenLoss) -> None:
        for name, values in result.means.items():
            self.sums[name] += float(values.detach().sum())
        for name, values in result.maxima.items():
            if len(values):
                self._raise(name, float(values.detach().max()))
        for name, values in result.effective.items():
            values = values.detach().double()
            for kind, part in (("n", len(values)), ("sum", float(values.sum())), ("squares", float(values.square().sum()))):
                self.weights[f"{name} {kind}"] += part

    def __iadd__(self, other: StepStatistics) -> StepStatistics:
        """Merge the statistics of another rank or another step."""
        for name, value in other.highest.items():
            self._raise(name, value)
        for mine, theirs in ((self.sums, other.sums), (self.weights, other.weights)):
            for name, value in theirs.items():
                mine[name] += value
        if other.routing is not None:
            self.routing = other.routing if self.routing is None else self.routing + other.routing
        self.common = self.common or other.common
        return self

    def metrics(self, denominator: float) -> Metrics:
        """Means over `denominator`, maxima, effective sample sizes, and how experts were chosen."""
        weights = self.weights
        effective = {
            name: weights[f"{name} sum"] ** 2 / (weights[f"{name} n"] * weights[f"{name} squares"])
            for name in dict.fromkeys(key.rpartition(" ")[0] for key in weights)
            if weights[f"{name} squares"]
        }
        means = {name: value / max(denominator, 1.0) for name, value in self.sums.items()}
        routing = {} if self.routing is None else self.routing.metrics()
        return {**means, **effective, **self.highest, **routing, **self.common}

    def _raise(self, name: str, value: float) -> None:
        self.highest[name] = max(self.highest.get(name, value), value)


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of optimizer step 0, 1, ...: linear warm-up, then constant or a decay to min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(total - 1 - config.warmup_steps, 1))
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def _loss_fault(batch: Batch, index: Tensor, result: TokenLoss) -> NonFinite | None:
    """Return NonFinite naming the tokens whose loss, or a metric reported with it, is not finite, if there are any."""
    quantities: Mapping[str, Tensor] = {"loss": result.loss, **result.means, **result.maxima}
    stacked = torch.stack([values.detach().float() for values in quantities.values()])
    if stacked.isfinite().all():
        return None
    wrong = ~stacked.isfinite()
    names = [name for name, row in zip(quantities, wrong, strict=True) if row.any()]
    places = wrong.any(0).nonzero()[:_NAMED, 0].cpu()
    found = [_token(batch, int(index[i]), {name: row[i] for name, row in quantities.items()}) for i in places]
    first = found[0]
    return NonFinite(
        f"the {names[0]} of this step is not finite ({first[names[0]]}) at token {first['token']} of sample {first['sample']}"
        f" of {first['prompt']}; its log-probability is {first['rollout_logprobs']} in the engine",
        {"what": names, "tokens": found},
    )


def _token(batch: Batch, place: int, quantities: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describe a token of the batch for an error report."""
    sample = int(batch.sequence[place])
    owners = [(group.prompt.row.id, number) for group in batch.groups for number in range(len(group.samples))]
    start = int(batch.lengths[:sample].sum())
    inputs = {name: getattr(batch, name) for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs", "advantages")}
    return {
        "prompt": owners[sample][0], "sample": owners[sample][1], "token": place - start,
        "token_id": int(batch.samples[sample].token_ids[place - start]),
        **{name: str(float(values[place])) for name, values in inputs.items() if values is not None},
        **{name: str(float(value.detach())) for name, value in quantities.items()},
    }  # fmt: skip
