"""Memory of two ranks that load SmolLM2-135M for fp32 training from bf16 files, as models are published: each reads its
own rows, or the whole model. Anonymous memory only: processes share the pages of mapped files."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import stack

from rlcore import registry
from rlcore.config.schema import RunConfig

RANKS = 2


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    stack.start()

    from rlcore_backends.ray import pools as ray_pools

    from rlcore.model.resolved import ResolvedModel
    from rlcore.runtime.pool import results
    from rlcore.runtime.watchdog import Watchdog

    ray_pools.Process = measured(ray_pools.Process)
    kind = registry.load("backends", "cpu")
    folder = tempfile.TemporaryDirectory(prefix="rlcore-bench-")
    publish(Path(folder.name))
    for own_rows in (True, False):
        settings = {
            "model": {"path": folder.name}, "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
            "rollout": {"engine": "torch"}, "backend": {"name": "cpu"}, "placement": {"kind": "ray", "devices": RANKS},
            "sharding": {"meta_init": own_rows},
        }  # fmt: skip
        resolved = ResolvedModel(RunConfig.model_validate(settings), kind(kind.Options()))
        with ray_pools.open_pools(resolved, Watchdog(0, Path())) as placement:
            grown = results([member.ask(ray_pools.Process.grown) for member in placement.pools[0].members])
        size = grown[0][1]
        held, most = sum(one[0] for one in grown), sum(one[2] for one in grown)
        what = "each its own rows" if own_rows else "each the model   "
        print(f"{what}  at most {most / size:.2f} models in all, {held / size:.2f} afterwards ({size / 1e6:.0f} MB each)")


def publish(folder: Path) -> None:
    """Save the model to `folder` in bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    source, _ = stack.smollm2()
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for file in source.glob("*.safetensors"):
        save_file({name: one.to(torch.bfloat16) for name, one in load_file(file).items()}, folder / file.name, {"format": "pt"})


def measured(process: type) -> type:
    """The worker process class with memory sampling added."""

    class Measured(process):
        def grown(self) -> tuple[int, int, int]:
            """Bytes: growth after loading, model size, peak growth while loading."""
            import threading

            before, most, done = anonymous(), [0], threading.Event()

            def look() -> None:
                while not done.wait(0.002):
                    most[0] = max(most[0], anonymous())

            watcher = threading.Thread(target=look)
            watcher.start()
            self.worker.load("grpo")
            done.set()
            watcher.join()
            size = sum(weight.numel() * weight.element_size() for weight in self.worker.actor.model.parameters())
            return anonymous() - before, size, most[0] - before

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    return Measured


if __name__ == "__main__":
    main()
