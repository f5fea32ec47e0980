"""Resident memory of a process after 1 GiB of tensors is offloaded and restored: under the default malloc and jemalloc.

Every round runs in its own process. Offloaded on a CPU, weights are copied in host memory; tensors not kept are freed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

TOTAL_MIB = 1024
SIZES_MIB = (0.02, 0.5, 4.0, 20.0, 64.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jemalloc", default="auto", metavar="PATH", help="default: where the launcher finds it")
    parser.add_argument("--here", type=float, metavar="MIB", help="one round in this process, of tensors of this size")
    options = parser.parse_args()
    if options.here:
        return print(" | ".join(f"{number:.2f}" for number in round_of(options.here)))
    from rlcore.runtime import jemalloc

    added, said = jemalloc.preload(options.jemalloc, os.environ)
    if said:
        sys.exit(said)
    print("| malloc | MiB a tensor | GiB held | parked, none kept | woken | parked, a copy kept | woken | seconds of purging |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, environment in (("C library", {}), ("jemalloc", added)):
        for size in SIZES_MIB:
            command = [sys.executable, __file__, "--here", str(size)]
            row = subprocess.check_output(command, env={**os.environ, **environment}, text=True)
            print(f"| {name} | {size:g} | {row.strip()} |", flush=True)


def round_of(size: float) -> list[float]:
    """Growth of resident memory (GiB) after allocation and after each move, then seconds of purging."""
    import torch

    from rlcore.runtime import jemalloc
    from rlcore.runtime.memory import OffloadedTensors

    before, seconds = resident(), 0.0
    tensors, between = [], []
    for _ in range(int(TOTAL_MIB / size)):
        tensors.append(torch.ones(int(size * 2**18)))
        between.append(torch.ones(64))  # small tensors that stay, as in a real run
    found = [resident() - before]
    for keep in (False, True):
        part = OffloadedTensors(lambda: tensors, keep)
        for move in (part.pause, part.resume):
            move()
            start = time.perf_counter()
            jemalloc.purge()
            seconds += time.perf_counter() - start
            found.append(resident() - before)
    return [*found, seconds]


def resident() -> float:
    """GiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 2**20


if __name__ == "__main__":
    main()
