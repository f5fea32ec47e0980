"""One update of SmolLM2-135M in fp32, 4 groups x 8 responses, prompt 128, response 64: rlcore's packed rows, each prompt once,
beside one padded batch of 32 whole sequences (transformers, sdpa, log_softmax of the logits at the responses)."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import stack

from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.loaded import LoadedModel

GROUPS, SAMPLES, PROMPT, RESPONSE = 4, 8, 128, 64
UNCLIPPED = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    stack.start()

    import torch
    from transformers import AutoModelForCausalLM

    from rlcore.algorithms.loss import objective
    from rlcore.algorithms.schedule import MinibatchSchedule
    from rlcore.model.actor import TorchActor
    from rlcore.model.forward import ForwardSettings
    from rlcore.types import Batch, Group, Prompt, Row, Sample

    folder, family = stack.smollm2()
    torch.manual_seed(0)
    prompts = torch.randint(1000, 40_000, (GROUPS, PROMPT))
    responses = torch.randint(1000, 40_000, (GROUPS * SAMPLES, RESPONSE))
    advantages = torch.randn(GROUPS * SAMPLES)
    zeros = np.zeros(RESPONSE, np.float32)
    groups = [
        Group(
            Prompt(Row(str(number), []), prompt.tolist(), prompt.tolist()),
            [Sample(tokens, zeros, "", "length", 0) for tokens in responses[number * SAMPLES :][:SAMPLES].numpy()],
        )
        for number, prompt in enumerate(prompts)
    ]
    batch = Batch.of(groups)
    batch = replace(batch, advantages=batch.per_token(advantages))

    settings = ForwardSettings(torch.device("cpu"), torch.float32, max_tokens=16_384, temperature=1.0)
    packed = TorchActor(
        LoadedModel(family.load(folder, torch.float32), family), settings, objective(AlgorithmConfig(), RESPONSE),
        OptimizerConfig(max_grad_norm=UNCLIPPED), MinibatchSchedule(total_steps=repeats),
    )  # fmt: skip
    padded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(padded.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def padded_update() -> None:
        rows = torch.cat([prompts.repeat_interleave(SAMPLES, 0), responses], dim=1)
        logits = padded(input_ids=rows, logits_to_keep=RESPONSE + 1, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(2, responses[..., None])[..., 0]
        (-(logprobs - logprobs.detach()).exp() * advantages[:, None]).mean().backward()
        torch.nn.utils.clip_grad_norm_(padded.parameters(), UNCLIPPED)
        optimizer.step()
        optimizer.zero_grad()

    def taken(model: torch.nn.Module) -> list[torch.Tensor]:
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    gradients: list[list[torch.Tensor]] = []
    hooks = [
        each.register_step_pre_hook(lambda *_, model=model: gradients.append(taken(model)))
        for each, model in ((packed.learner.optimizer, packed.model), (optimizer, padded))
    ]
    times: dict[str, list[float]] = {"packed": [], "padded": []}
    for repeat in range(repeats):
        for name, update in (("packed", lambda: packed.update(batch)), ("padded", padded_update)):
            start = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - start)
        if repeat == 0:  # both models still have the same weights
            for hook in hooks:
                hook.remove()
    names = [name for name, _ in padded.named_parameters()]
    assert names == [name for name, _ in packed.model.named_parameters()]
    ours, theirs = (torch.cat([one.flatten() for one in side]).double() for side in gradients)
    difference, size = (ours - theirs).norm(), theirs.norm()
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(f"packed {seconds['packed']:.1f} s, padded {seconds['padded']:.1f} s, median of {repeats}: "
          f"{seconds['padded'] / seconds['packed']:.2f} times faster (target 2.5)")  # fmt: skip
    print(f"relative difference of the gradients {float(difference / size):.1e} (target 1e-5)")


if __name__ == "__main__":
    main()
