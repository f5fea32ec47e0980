"""Lower bound of a step's cost: useful floating-point operations by stage, and this machine's operations per second.

Useful work is what the gradient needs: each prompt and response token once, no padding, no recomputation. A backward
pass counts as two forward passes.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def forward_flops(model: Any, groups: Sequence[Any]) -> float:
    """One forward pass: matrices at every token, the LM head at response tokens, attention over visible tokens."""
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


def rate(model: Any, dtype: torch.dtype, rows: int = 2048, repeats: int = 7) -> float:
    """Operations per second of a training step's matmuls alone: each layer's output, the gradient of its input and that
    of its weight, at these rows, medians."""
    shapes = Counter(tuple(w.shape) for name, w in model.named_parameters() if w.ndim == 2 and ".layers." in name)
    seconds = operations = 0.0
    for (out, width), count in shapes.items():
        inputs, weight, above = (torch.randn(*size).to(dtype) for size in ((rows, width), (out, width), (rows, out)))
        products = (lambda i, w, g: i @ w.T), (lambda i, w, g: g @ w), (lambda i, w, g: g.T @ i)
        for product in products:
            times = [_seconds(partial(product, inputs, weight, above)) for _ in range(repeats)]
            seconds += count * statistics.median(times)
            operations += count * 2.0 * rows * out * width
    return operations / seconds


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
