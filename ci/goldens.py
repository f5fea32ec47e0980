"""Writes rlcore/diagnose/conformance/goldens.json: float64 CPU results of the models of `rlcore check`.

Transformers' own forward pass, one sample at a time; norms, softmax, loss and AdamW from their formulas. Only the inputs come
from rlcore. Rotary angles, and a vision tower's rotation by them, are float32 in transformers, and here.

    python ci/goldens.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore import registry
from rlcore.diagnose.conformance.case import ALGORITHM, OPTIMIZER, SOURCES, STEPS, TEMPERATURE, Case, make

FILE = Path(__file__).parents[1] / "rlcore" / "diagnose" / "conformance" / "goldens.json"
CLASSES = {"text": AutoModelForCausalLM, "vision": AutoModelForImageTextToText}


def goldens(kind: str, case: Case) -> dict[str, Any]:
    """Log-probabilities, loss terms and gradient norm; log-probabilities again after some steps."""
    model = CLASSES[kind].from_pretrained(case.folder, dtype=torch.float64, attn_implementation="sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' computes in float32
            module.forward = MethodType(root_mean_square, module)
    state: dict[str, tuple[Tensor, Tensor]] = {}
    found: dict[str, Any] = {}
    for step in range(1, STEPS + 1):
        logprobs, entropy = distribution(model, case)
        parts = losses(logprobs, entropy, case)
        model.zero_grad()
        (parts["pg_loss"] + ALGORITHM.kl_coef * parts["kl_loss"] - ALGORITHM.entropy_coef * parts["entropy"]).backward()
        norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
        if step == 1:
            found = {"mark": case.mark, "logprobs": logprobs.tolist(), "grad_norm": norm.item()}
            found |= {name: value.item() for name, value in parts.items()}
        adamw(model, state, step)
    with torch.no_grad():
        return found | {"logprobs_after": distribution(model, case)[0].tolist()}


def root_mean_square(self: Any, states: Tensor) -> Tensor:
    """arXiv 1910.07467."""
    return self.weight * states / (states.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def distribution(model: Any, case: Case) -> tuple[Tensor, Tensor]:
    """[N] log-probabilities and entropies, packed order."""
    logprobs, entropies = [], []
    for prompt, response in samples(case):
        ids = torch.tensor([prompt.token_ids + response])
        logits = model(input_ids=ids, use_cache=False, **images(prompt, ids)).logits[0]
        spread = (logits[len(prompt.token_ids) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logprobs.append(spread.gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(-(spread.exp() * spread).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def samples(case: Case) -> Iterator[tuple[Any, list[int]]]:
    return ((group.prompt, sample.token_ids.tolist()) for group in case.batch.groups for sample in group.samples)


def images(prompt: Any, ids: Tensor) -> dict[str, Tensor]:
    if prompt.vision is None:
        return {}
    kinds = (ids == max(set(prompt.token_ids), key=prompt.token_ids.count)).int()  # the most frequent token is the placeholder
    assert kinds.sum() == 6, "tokens of the picture"
    return {"pixel_values": prompt.vision["pixel_values"].double(), "image_grid_thw": prompt.vision["image_grid_thw"],
            "mm_token_type_ids": kinds}  # fmt: skip


def losses(logprobs: Tensor, entropy: Tensor, case: Case) -> dict[str, Tensor]:
    """The clipped surrogate (arXiv 1707.06347), the k3 KL estimate and the entropy: means over tokens."""
    batch, keep = case.batch, case.batch.loss_mask
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None and batch.advantages is not None
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - ALGORITHM.clip_low, 1 + ALGORITHM.clip_high)
    surrogate = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    apart = batch.ref_logprobs - logprobs
    divergence = apart.exp() - apart - 1
    return {"pg_loss": surrogate[keep].mean(), "kl_loss": divergence[keep].mean(), "entropy": entropy[keep].mean()}


@torch.no_grad()
def adamw(model: Any, state: dict[str, tuple[Tensor, Tensor]], step: int) -> None:
    """arXiv 1711.05101; no weight decay on vectors."""
    (fast, slow), rate = OPTIMIZER.betas, OPTIMIZER.lr
    for name, weight in model.named_parameters():
        first, second = state.setdefault(name, (torch.zeros_like(weight), torch.zeros_like(weight)))
        first.mul_(fast).add_((1 - fast) * weight.grad)
        second.mul_(slow).add_((1 - slow) * weight.grad**2)
        decay = OPTIMIZER.weight_decay if weight.ndim > 1 else 0
        weight.sub_(rate * decay * weight)
        weight.sub_(rate * (first / (1 - fast**step)) / ((second / (1 - slow**step)).sqrt() + OPTIMIZER.eps))


def main() -> None:
    kind = registry.load("backends", "cpu")
    kind(kind.Options()).prepare()
    found = {}
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = goldens(name, make(name, Path(folder) / name))
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
