"""What a step must cost: floating-point operations of its useful work, by stage, and how many this machine does a second.

Useful is what the gradient needs: each token of prompts and responses once, no padding, nothing computed again. A backward
pass is two forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch


def forward_flops(model: Any, groups: Sequence[Any]) -> float:
    """Of one pass: matrices at every token, the head at response tokens, attention over what each token sees."""
    config = model.config.get_text_config()
    layers = sum(weight.numel() for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name)
    head = config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    tokens = targets = seen = 0.0
    for group in groups:
        prompt, responses = len(group.prompt.token_ids), [len(sample.token_ids) for sample in group.samples]
        tokens += prompt + sum(responses)
        targets += sum(responses)
        seen += prompt**2 / 2 + sum(length * (prompt + length / 2) for length in responses)
    return 2 * (layers * tokens + head * targets) + 4 * width * seen * config.num_hidden_layers


def rate(model: Any, dtype: torch.dtype, rows: int = 2048, seconds: float = 2.0) -> float:
    """Operations a second of the model's own largest layer product, the best of what fits in `seconds`."""
    weight = max((w for n, w in model.named_parameters() if w.ndim == 2 and ".layers." in n), key=torch.Tensor.numel)
    left, right = torch.randn(rows, weight.shape[1]).to(dtype), weight.detach().to(dtype).T
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * rows * weight.numel() / best
