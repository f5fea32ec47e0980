"""TRL's side of race_sft.py: `python peer_sft.py ROWS.jsonl MODEL bf16|fp32 padded|packed` trains one epoch with SFTTrainer and
prints one JSON line per optimizer step."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from typing import Any

from rlcore_backends.cpu.backend import cure_torchvision

cure_torchvision()

from datasets import load_dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

ROWS_PER_STEP, PER_FORWARD = 32, 8
PACKED_PER_STEP, PACKED_PER_FORWARD = 6, 2  # packed rows of 1,024 tokens: about 32 rows of GSM8K


class Clock(TrainerCallback):
    """Times whole optimizer steps."""

    rows = float(ROWS_PER_STEP)  # of an optimizer step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"all": time.perf_counter() - self.began, "rows": self.rows, "peak_gib": peak}), flush=True)


def main(rows: str, folder: str, precision: str, layout: str) -> None:
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output, per_device_train_batch_size=PER_FORWARD, learning_rate=1e-5, num_train_epochs=1,
            gradient_accumulation_steps=ROWS_PER_STEP // PER_FORWARD, gradient_checkpointing=False, max_length=1024,
            bf16=precision == "bf16", packing=layout == "packed", completion_only_loss=True, use_cpu=True, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
        )  # fmt: skip
        if layout == "packed":
            config.per_device_train_batch_size = PACKED_PER_FORWARD
            config.gradient_accumulation_steps = PACKED_PER_STEP // PACKED_PER_FORWARD
        clock, data = Clock(), load_dataset("json", data_files=rows, split="train")
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), args=config, callbacks=[clock], train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        if layout == "packed":
            clock.rows = len(data) / len(trainer.train_dataset) * PACKED_PER_STEP
        trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
