"""A device's training speed: an update of a random Qwen3 (tokens/s, model FLOP utilisation, memory), and the attention and head
kernels against plain torch. For GPUs and NPUs; `--backend cpu --shape tiny` is a smoke test on a CPU.

Utilisation counts useful operations only (bounds.py), relative to the device's dense matmul rate in the compute dtype.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rlcore import registry
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.loaded import LoadedModel

SHAPES = {  # hidden size, layers, query heads, key heads, intermediate size, vocabulary
    "tiny": (256, 2, 4, 2, 768, 8192),
    "0.5B": (1024, 24, 16, 8, 3072, 151_936),
    "1.5B": (2048, 24, 16, 8, 6144, 151_936),
}
RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s from the vendor's data sheets
MFU = 0.45  # the target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--micro-batch", type=int, default=8192, help="tokens")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--response-tokens", type=int, default=1024, help="at most; lengths differ")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", type=float, help="of dense products a second, where the device's is not known here")
    parser.add_argument("--no-fuse", action="store_true", help="without the backend's own layers")
    parser.add_argument("--profile", action="store_true", help="one more update, by operator")
    options = parser.parse_args()
    backend = start(options.backend)

    import torch

    device = backend.device(0)
    dtype = torch.bfloat16 if backend.default_precision() == "bf16" else torch.float32
    states = torch.get_device_module(device)
    name = states.get_device_name(device) if hasattr(states, "get_device_name") else platform.processor() or device.type
    print(f"{name}, torch {torch.__version__}, {dtype}, micro-batches of {options.micro_batch} tokens")
    for shape in options.shape or ("0.5B", "1.5B"):
        measure(shape, options, backend, dtype, name)


def start(name: str) -> Any:
    """The backend, as `rlcore grpo` starts it."""
    from rlcore.diagnose import doctor

    kind = registry.load("backends", doctor.choose().name if name == "auto" else name)
    backend = kind(kind.Options())
    for variable, value in backend.environment().items():
        os.environ.setdefault(variable, value)
    backend.prepare()
    return backend


def measure(shape: str, options: Any, backend: Any, dtype: Any, name: str) -> None:
    import bounds
    import torch
    from update import batch_of

    from rlcore.algorithms.loss import objective
    from rlcore.algorithms.schedule import MinibatchSchedule
    from rlcore.model.actor import TorchActor
    from rlcore.model.forward import ForwardSettings
    from rlcore.model.packing import microbatches

    device, states = backend.device(0), torch.get_device_module(backend.device(0))
    model, family = random_model(shape, device)
    batch = batch_of(options.prompts, options.samples, options.prompt_tokens, options.response_tokens, SHAPES[shape][5])
    settings = ForwardSettings(device, dtype, options.micro_batch, 1.0)
    goal = objective(AlgorithmConfig(), options.response_tokens)
    actor = TorchActor(
        LoadedModel(model if options.no_fuse else backend.fuse(model), family), settings, goal, OptimizerConfig(),
        MinibatchSchedule(total_steps=99), backend.adamw,
    )  # fmt: skip
    counts = hasattr(states, "max_memory_allocated")
    actor.update(batch)  # compiles, and allocates the optimizer's moments
    if counts:
        states.reset_peak_memory_stats(device)
    seconds = median(options.repeats, partial(actor.update, batch), states)
    tokens = sum(packed.tokens for packed in microbatches(batch, options.micro_batch))
    useful = 3 * bounds.forward_flops(actor.model, batch.groups)
    rate = options.rate or next((value for part, value in RATES.items() if part in name), None)
    used = f", MFU {useful / seconds / rate:.1%} (target {MFU:.0%})" if rate else ", MFU unknown: give --rate"
    peak = f", {states.max_memory_allocated(device) / 2**30:.1f} GiB at most" if counts else ""
    print(f"{shape}: update of {tokens} packed tokens {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s{used}{peak}")
    row = microbatches(batch, options.micro_batch)[0]
    for what, calls in (("attention", attention(shape, row, device, dtype)), ("head", head(shape, row, device, dtype))):
        ours, plain = (median(options.repeats, call, states) for call in calls)
        print(f"  {what}, a row forward and backward: {ours * 1e3:.1f} ms, plain torch {plain * 1e3:.1f} ms")
    if options.profile:
        with torch.profiler.profile() as profile:
            actor.update(batch)
            states.synchronize(device)
        print(profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25, max_name_column_width=50))


def random_model(shape: str, device: Any) -> tuple[Any, Any]:
    """A Qwen3 built in memory, and its model family."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from rlcore.model.attention import NAME

    width, layers, heads, shared, inner, words = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=shared,
        head_dim=width // heads, intermediate_size=inner, vocab_size=words, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=NAME)
    with tempfile.TemporaryDirectory() as folder:
        registry.load("models", "tiny_qwen3")(Path(folder))
        return model.eval(), registry.load("families", "qwen3")(Path(folder))


def attention(shape: str, row: Any, device: Any, dtype: Any) -> list[Callable[[], None]]:
    """The registered kernel and plain torch on the row's segments."""
    import torch
    from torch import nn
    from transformers import AttentionInterface

    from rlcore.model.attention import NAME, packed_attention

    width, _, heads, shared, *_ = SHAPES[shape]
    size = width // heads
    shapes = [(1, count, row.tokens, size) for count in (heads, shared, shared)]
    states = [torch.randn(each, device=device, dtype=dtype, requires_grad=True) for each in shapes]

    def call(kernel: Any) -> None:
        output, _ = kernel(nn.Module(), *states, None, segments=row.segments, scaling=size**-0.5)
        output.sum().backward()

    return [partial(call, kernel) for kernel in (AttentionInterface()[NAME], packed_attention)]


def head(shape: str, row: Any, device: Any, dtype: Any) -> list[Callable[[], None]]:
    """The tiled head and log_softmax of whole logits, at the row's targets."""
    import torch

    from rlcore.model.logprob import token_logprobs

    width, *_, words = SHAPES[shape]
    hidden = torch.randn(len(row.targets), width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(words, width, device=device) / width**0.5).requires_grad_()
    targets = row.targets.to(device)

    def tiled() -> None:
        token_logprobs(hidden, weight, targets)[0].sum().backward()

    def whole() -> None:
        (hidden @ weight.to(dtype).T).float().log_softmax(-1).gather(1, targets[:, None]).sum().backward()

    return [tiled, whole]


def median(repeats: int, call: Callable[[], object], states: Any) -> float:
    """Seconds, device synchronized."""
    call()
    times = []
    for _ in range(repeats):
        states.synchronize()
        began = time.perf_counter()
        call()
        states.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
