"""A GRPO step of a tiny Qwen2, rlcore beside TRL: 2 prompts x 8 samples, at most 16 new tokens, reward the share of sevens.

TRL runs ../shared/bench/trl_tiny.py unchanged. rlcore samples with torch too: vLLM's attention on a CPU has no kernel for
heads of 16. Each side's first step is not counted. Ratios above 1: rlcore is faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import race

TEXT = "0123456789+-*/= abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each side")
    options = parser.parse_args()
    program = race.check("trl_tiny.py")
    trl = race.theirs(program, [str(options.steps + 1)])
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        print(race.table(race.ours(settings(folder), rows(), options.steps), trl))
    print("target: rlcore's step is faster")


def settings(model: str) -> dict[str, object]:
    """Settings of trl_tiny.py as a run file."""
    return {
        "model": {"path": model, "precision": "fp32"},
        "data": {"max_prompt_tokens": 16},
        "rollout": {"engine": "torch", "max_new_tokens": 16, "temperature": 1.0},
        "reward": [{"name": "ours.sevens"}],
        "algorithm": {"group_size": 8},
        "optimizer": {"lr": 1e-2},
        "train": {"prompts_per_step": 2},
    }


def rows() -> list[dict[str, str]]:
    return [{"prompt": f"{i % 10}+{i // 10 % 10}="} for i in range(64)]


def make_model(folder: Path) -> None:
    """trl_tiny.py's model and tokenizer, as a Hugging Face folder."""
    from rlcore_backends.cpu.backend import cure_torchvision

    cure_torchvision()
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *TEXT])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    ).save_pretrained(folder)  # fmt: skip


if __name__ == "__main__":
    main()
