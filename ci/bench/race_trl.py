"""A GRPO step of SmolLM2-135M, rlcore beside TRL: 8 prompts x 8 samples, at most 64 new tokens, KL 0.04.

TRL runs ../shared/bench/trl_smol.py unchanged (transformers' generate; its vLLM mode fails on a CPU). Each side's first
step is not counted. Ratios above 1: rlcore is faster.
"""

from __future__ import annotations

import argparse

import race

from rlcore import registry

SAMPLES = 64  # per step
TARGETS = {  # by precision, prompt tokens, samples per prompt
    ("fp32", 45, 8): 2.5, ("fp32", 256, 8): 3.5, ("fp32", 256, 16): 4.0, ("bf16", 45, 8): 8.0, ("bf16", 256, 16): 18.0,
    ("default", 45, 8): 7.0,
}  # fmt: skip
BARE_PROMPT = 45  # tokens of a question in SmolLM2's chat template, its system text included
WORD = "one "  # one SmolLM2 token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "bf16", "default"), default="fp32",
                        help="of both sides; default is rlcore's own against TRL's own, fp32")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, choices=(45, 256), default=45)
    parser.add_argument("--group", type=int, choices=(8, 16), default=8, help="samples of a prompt, of 64 a step")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a side and round")
    parser.add_argument("--rounds", type=int, default=1, help="times TRL and rlcore take turns")
    options = parser.parse_args()
    program = race.check("trl_smol.py")
    kind = registry.load("backends", "cpu")
    if options.precision != "fp32" and kind(kind.Options()).default_precision() == "fp32":
        note = ": rlcore's default is fp32 here, which --precision fp32 measures" if options.precision == "default" else ""
        print(f"skipped: no bf16 instructions on this processor{note}")
        return
    filler = WORD * (options.prompt_tokens - BARE_PROMPT)
    environment = {"STEPS": str(options.steps + 1), "BF16": str(int(options.precision == "bf16")), "FILLER": filler}
    environment["GROUP"] = str(options.group)
    rlcore: race.Steps = []
    trl: race.Steps = []
    for _ in range(options.rounds):
        trl += race.theirs(program, ["hf"], environment)
        rlcore += race.ours(settings(options), rows(filler), options.steps)
    print(race.table(rlcore, trl))
    if target := TARGETS.get((options.precision, options.prompt_tokens, options.group)):
        print(f"target: TRL's step at least {target} times as long")


def settings(options: argparse.Namespace) -> dict[str, object]:
    """Settings of trl_smol.py as a run file. Its micro-batch is 16 padded sequences; the token cap here equals that."""
    precision, group = options.precision, options.group
    return {
        "model": {"path": "smollm2", "precision": "auto" if precision == "default" else precision},
        "data": {"max_prompt_tokens": options.prompt_tokens + 10},
        "rollout": {"max_new_tokens": 64, "temperature": 1.0},
        "reward": [{"name": "ours.contains_answer"}],
        "algorithm": {"group_size": group, "kl_coef": 0.04},
        "optimizer": {"lr": 1e-6},
        "train": {
            "prompts_per_step": SAMPLES // group, "max_tokens_per_microbatch": 16 * (options.prompt_tokens + 10 + 64),
        },
    }  # fmt: skip


def rows(filler: str) -> list[dict[str, str]]:
    """Rows of trl_smol.py."""
    return [
        {"prompt": f"{filler}What is {a}+{a * 3 + 1}? Reply with the number only.", "answer": str(4 * a + 1)}
        for a in range(512)
    ]


if __name__ == "__main__":
    main()
