"""Reading rows: memory of a run over a parquet file of images compared with the same run over a few of them, and the share of
a step that waits for prompts of 1,024-token images, with and without encoding them ahead."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 6
PROMPTS = 8
GROUP = 100  # rows of a row group, as the hub's image data sets have them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file")
    parser.add_argument("--child", nargs=2, metavar=("RUN.yaml", "AHEAD"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child[0], ahead=options.child[1] == "ahead")
    with tempfile.TemporaryDirectory(prefix="rlcore-bench-") as folder:
        few, many = Path(folder, "few.parquet"), Path(folder, "many.parquet")
        rows = write(many, options.gb), write(few, 0)
        peaks = {path: run(Path(folder), path, "ahead")["peak"] for path in (few, many)}
        grown = (peaks[many] - peaks[few]) / 2**20
        print(f"memory   {os.path.getsize(many) / 2**30:.2f} GiB, {rows[0]} rows: peak {peaks[many] / 2**20:.0f} MiB;"
              f" {rows[1]} rows: {peaks[few] / 2**20:.0f} MiB; {grown:.0f} MiB more")  # fmt: skip
        for ahead in ("ahead", "when drawn"):
            shares = run(Path(folder), many, ahead)["shares"]
            listed = ", ".join(f"{share:.1%}" for share in shares)
            print(f"encoded {ahead:<10}  timing/data of steps 2 to {STEPS}: {listed} of timing/all")


def write(path: Path, gigabytes: float) -> int:
    """Write rows of photo-sized JPEG noise in row groups of 100; returns their number."""
    import numpy
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    images = []
    for seed in range(20):
        pixels = numpy.random.default_rng(seed).integers(0, 256, (896, 896, 3), numpy.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).resize((448, 448)).resize((896, 896)).save(stream, "JPEG", quality=90)
        images.append(stream.getvalue())
    count = max(PROMPTS * STEPS, int(gigabytes * 2**30 / (sum(map(len, images)) / len(images))))
    schema = pyarrow.schema({
        "prompt": pyarrow.string(), "answer": pyarrow.string(),
        "images": pyarrow.list_(pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
    })  # fmt: skip
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
        for start in range(0, count, GROUP):
            chunk = [
                {"prompt": f"<image>What is {row}?", "answer": "1", "images": [{"bytes": images[row % 20], "path": None}]}
                for row in range(start, min(start + GROUP, count))
            ]
            file.write_table(pyarrow.Table.from_pylist(chunk, schema))
    return count


def run(folder: Path, path: Path, ahead: str) -> dict:
    """A run in a process of its own: its peak memory, and `timing/data / timing/all` of each step after the first."""
    settings = {
        "model": {"path": "tiny_qwen2_5_vl", "options": {"max_pixels": 1024 * 28**2, "context": 4096}},
        "data": {
            "train": {"path": str(path), "options": {"images": "images"}}, "max_prompt_tokens": 1100, "check": "drawn",
        },
        "reward": [{"name": "math"}], "rollout": {"max_new_tokens": 32}, "algorithm": {"group_size": 4},
        "train": {"steps": STEPS, "prompts_per_step": PROMPTS, "max_tokens_per_microbatch": 4096},
        "logging": {"tensorboard": False, "samples_on_console": 0},
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, __file__, "--child", str(file), ahead]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(told.splitlines()[-1])


def child(file: str, ahead: bool) -> None:
    from rlcore.cli.main import main as rlcore
    from rlcore.runtime.memory import peak_rss

    if not ahead:
        from rlcore.data.prompts import PromptSource

        PromptSource._prepare = lambda self, count: None
    folder = tempfile.mkdtemp(prefix="rlcore-bench-run-")
    assert rlcore(["grpo", file, "--backend", "cpu", "--run-dir", folder]) == 0
    steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    shares = [step["timing/data"] / step["timing/all"] for step in steps[1:]]
    print(json.dumps({"peak": peak_rss(), "shares": shares}))


if __name__ == "__main__":
    main()
