"""The device's kernels against plain torch in float64 on a CPU: relative distances of whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlcore.diagnose.conformance import case
from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.diagnose.conformance.section import Setup
from rlcore.distributed.fingerprint import fingerprint
from rlcore.model import attention
from rlcore.model.logprob import token_logprobs
from rlcore.model.packing import microbatches
from rlcore.runtime.memory import OffloadedTensors
from rlcore.types import Segment

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
HOST = torch.device("cpu")
SEGMENTS = (Segment(0, 150, (70, 33, 1)), Segment(254, 40, (90, 90)), Segment(474, 30, ()))
ROW, HEADS, SHARED, WIDTH = 504, 4, 2, 64  # tokens; query heads; key heads; head size
TARGETS, WORDS, HIDDEN = 300, 1500, 192  # vocabulary: larger than a tile of the head
SIZES = (1, 4096, 100_003)

Results = list[Tensor]
Call = Callable[[Results], Sequence[Tensor]]


def measure(setup: Setup) -> Iterator[Measurement]:
    for name, dtype in setup.dtypes.items():
        for what, measured in (("attention over packed rows", attend), ("log-probability head", score)):
            output, gradient = measured(setup.device, dtype)
            yield Measurement(f"{what}, {name}: output", output, LIMITS[dtype])
            yield Measurement(f"{what}, {name}: gradient", gradient, LIMITS[dtype])
        yield Measurement(f"fused layers, {name}: hidden states and gradient", fuse(setup, dtype), 3 * LIMITS[dtype])
    yield Measurement("optimizer: what five steps of AdamW move", step(setup), 1e-5)
    changed, kept = offload(setup.device)
    yield Measurement("tensors whose fingerprint differs from the processor's", mark(setup.device))
    yield Measurement("offloaded tensors that come back changed", changed)
    yield Measurement("offloaded bytes that stay on the device", kept)


def attend(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Attention as the model's layers call it, against its definition in plain torch."""
    shapes = [(1, heads, ROW, WIDTH) for heads in (HEADS, SHARED, SHARED)]
    options: Mapping[str, Any] = {"segments": SEGMENTS, "scaling": WIDTH**-0.5}

    def plain(states: Results) -> Sequence[Tensor]:
        query, key, value = states
        return [attention.packed_attention(nn.Module(), query, key, value, None, **options)[0]]

    return distances(
        [noise(shape, number).to(dtype) for number, shape in enumerate(shapes)], device,
        lambda states: [AttentionInterface()[attention.NAME](nn.Module(), *states, None, **options)[0]],
        plain,
    )


def score(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    targets = torch.arange(TARGETS) * 7 % WORDS

    def tiled(states: Results) -> Sequence[Tensor]:
        hidden, weight = states
        return token_logprobs(hidden, weight, targets.to(device), case.TEMPERATURE)

    def whole(states: Results) -> Sequence[Tensor]:
        hidden, weight = states
        spread = (hidden @ weight.T / case.TEMPERATURE).log_softmax(-1)
        return spread.gather(1, targets[:, None])[:, 0], -(spread.exp() * spread).sum(-1)

    hidden, weight = noise((TARGETS, HIDDEN), 0), noise((WORDS, HIDDEN), 1) / HIDDEN**0.5
    return distances(
        [hidden.to(dtype), weight.to(dtype)], device, tiled, whole,
    )


def distances(inputs: Results, device: torch.device, call: Call, yardstick: Call) -> tuple[float, float]:
    """Relative distances of the outputs, and of the gradients of all inputs."""
    found = []
    for function, states in ((call, [one.to(device) for one in inputs]), (yardstick, [one.double() for one in inputs])):
        states = [state.detach().requires_grad_() for state in states]
        outputs = function(states)
        torch.autograd.backward(list(outputs), [noise(one.shape, 9).to(one) for one in outputs])
        found.append((outputs, [state.grad for state in states]))
    ours, exact = found
    return apart(ours[0], exact[0]), apart(ours[1], exact[1])


def fuse(setup: Setup, dtype: torch.dtype) -> float:
    """Distance between a model's layers with and without the device's kernels."""
    made = case.make("text", setup.folder / f"fused {dtype}")
    (packed, *_) = microbatches(made.batch, case.CAP)
    found = []
    for backend in (None, setup.backend):
        actor = made.actor(setup.device, dtype, backend)
        with actor.working():
            hidden = made.family.hidden(actor.model, packed)
            hidden.backward(noise(hidden.shape, 9).to(hidden))
        found.append([hidden, *(weight.grad for weight in actor.model.parameters())])
    return apart(found[1], found[0])


def step(setup: Setup) -> float:
    """Compare the device's AdamW with torch's own in float64."""
    starts = [noise(shape, number) for number, shape in enumerate(((64, 48), (3000,)))]
    found = []
    for adamw, device, dtype in ((setup.backend.adamw, setup.device, torch.float32), (torch.optim.AdamW, HOST, torch.float64)):
        weights = [nn.Parameter(start.clone().to(device, dtype)) for start in starts]
        groups = [{"params": [(str(number), weight)], "weight_decay": 0.1 * number} for number, weight in enumerate(weights)]
        optimizer = adamw(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        for seed in range(5):
            for weight in weights:
                weight.grad = noise(weight.shape, seed).to(weight)
            optimizer.step()
        found.append([weight.detach().cpu() - start for weight, start in zip(weights, starts, strict=True)])
    return apart(*found)


def mark(device: torch.device) -> float:
    """Number of fingerprints that differ between device and CPU, over several sizes and dtypes."""
    tensors = [noise((size,), size).to(dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)]
    return float(sum(fingerprint(tensor) != fingerprint(tensor.to(device)) for tensor in tensors))


def offload(device: torch.device) -> tuple[float, float]:
    """Number of tensors changed by offloading, and bytes that their storages kept meanwhile."""
    before = [noise((size,), size) for size in SIZES]
    tensors = [tensor.clone().to(device) for tensor in before]
    offloaded = OffloadedTensors(lambda: tensors)
    offloaded.pause()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    offloaded.resume()
    return float(sum(not torch.equal(one, other.cpu()) for one, other in zip(before, tensors, strict=True))), float(kept)


def noise(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def apart(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest distance of corresponding tensors, relative to their norm."""
    pairs = [(one.detach().cpu().double(), other.detach().cpu().double()) for one, other in zip(ours, exact, strict=True)]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)
