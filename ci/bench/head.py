"""The log-probability head alone, forward and backward: rlcore's tiles against log_softmax of the whole logits.

Each side runs in its own process. `extra` is peak resident memory above the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

SHAPES = {"target": (1024, 151_936, 256), "smollm2": (4096, 49_152, 576)}  # tokens, vocabulary, width
EXTRA_MB, TIME_RATIO = 500, 1.2  # the targets, at shape "target"
SWEEP = (0.5, 1.0, 2.0, 4.0, 8.0, 32.0, 256.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="target")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="rlcore's side at many tile sizes")
    parser.add_argument("--side", choices=("naive", "rlcore"), help=argparse.SUPPRESS)
    parser.add_argument("--tile-mib", type=float, default=4.0, metavar="MIB", help="of float32 logits at a time")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, SHAPES[options.shape], options.repeats, options.tile_mib)))
        return
    tokens, vocabulary, width = SHAPES[options.shape]
    print(f"N={tokens} V={vocabulary:,} H={width} fp32, forward + backward, median of {options.repeats}")
    if options.sweep:
        for size in SWEEP:
            result = apart("rlcore", options.shape, options.repeats, size)
            print(f"tiles of {size:5} MiB", described(result), flush=True)
        return
    sides = {side: apart(side, options.shape, options.repeats, options.tile_mib) for side in ("naive", "rlcore")}
    for side, result in sides.items():
        print(f"{side:6}", described(result))
    print(f"time ratio {sides['rlcore']['seconds'] / sides['naive']['seconds']:.2f}")
    if options.shape == "target":
        print(f"targets: at most {EXTRA_MB} MB extra and a time ratio of {TIME_RATIO}")


def described(result: Mapping[str, float]) -> str:
    return f"{result['seconds']:6.2f} s {result['extra_mb']:6.0f} MB extra"


def apart(side: str, shape: str, repeats: int, tile_mib: float) -> dict[str, float]:
    """Run `measure` in a subprocess, so that memory is measured per side."""
    command = [sys.executable, __file__, "--side", side, "--shape", shape, "--repeats", str(repeats)]
    command += ["--tile-mib", str(tile_mib)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(side: str, shape: tuple[int, int, int], repeats: int, tile_mib: float) -> dict[str, float]:
    import torch

    from rlcore.model import logprob

    tokens, vocabulary, width = shape
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def once(count: int) -> None:
        if side == "naive":
            chosen = (hidden[:count] @ weight.T).log_softmax(-1).gather(1, targets[:count, None])[:, 0]
        else:
            chosen, _ = logprob.token_logprobs(hidden[:count], weight, targets[:count], tile_bytes=int(tile_mib * 2**20))
        (chosen.sum() / tokens).backward()
        hidden.grad = weight.grad = None

    once(8)  # loads the kernels
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, times = resident("VmRSS"), []
    for _ in range(repeats):
        start = time.perf_counter()
        once(tokens)
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "extra_mb": (resident("VmHWM") - before) / 1e6}


def resident(what: str) -> int:
    """Bytes, from /proc."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
