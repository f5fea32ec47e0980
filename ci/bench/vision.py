"""Reference, old log-probabilities and update of a Qwen2.5-VL with a frozen vision tower: each image encoded once per step,
once per pass, or once per sample (with its own prompt). 4 prompts with an image of 256 tokens, 8 samples each."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import stack

from rlcore import registry
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.loaded import LoadedModel

PROMPTS, SAMPLES, RESPONSE, SIDE = 4, 8, 32, 448  # pixels: 16 x 16 merged patches
TARGET = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    stack.start()

    import torch
    from PIL import Image

    from rlcore.algorithms.loss import objective
    from rlcore.algorithms.schedule import MinibatchSchedule
    from rlcore.model.actor import TorchActor
    from rlcore.model.forward import ForwardSettings
    from rlcore.model.reference import TorchReference
    from rlcore.model.vision import VisionEncoder
    from rlcore.types import Batch, Group, Row, Sample

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = {"hidden_size": 256, "layers": 6, "vision_hidden_size": 256, "vision_layers": 6, "max_pixels": SIDE * SIDE}
        registry.load("models", "tiny_qwen2_5_vl")(folder, **small)
        family = registry.load("families", "qwen2_5_vl")(folder)
        models = [family.load(folder, torch.float32) for _ in range(2)]
    for model in models:
        family.vision_tower(model).requires_grad_(False)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    rows = [
        Row(str(i), [{"role": "user", "content": content}], images=[Image.new("RGB", (SIDE, SIDE), (60 * i, 90, 120))])
        for i in range(PROMPTS)
    ]
    torch.manual_seed(0)
    sizes, certain = (SAMPLES, RESPONSE), np.zeros(RESPONSE, np.float32)
    groups = [
        Group(family.encode(row), [Sample(tokens, certain, "", "length", 0) for tokens in torch.randint(20, 90, sizes).numpy()])
        for row in rows
    ]
    batch = Batch.of(groups)
    batch = replace(batch, advantages=batch.per_token(torch.randn(PROMPTS * SAMPLES)))
    apart = replace(batch, groups=[Group(group.prompt, [sample]) for group in batch.groups for sample in group.samples])
    settings = ForwardSettings(torch.device("cpu"), torch.float32, 4096, 1.0)
    encoder = VisionEncoder(family.vision_tower(models[0]), family, settings, images_per_batch=PROMPTS)
    goal, optimizer = objective(AlgorithmConfig(), RESPONSE), OptimizerConfig(lr=1e-9)
    actor = TorchActor(LoadedModel(models[0], family), settings, goal, optimizer, MinibatchSchedule(total_steps=99))
    reference = TorchReference(LoadedModel(models[1], family), settings)
    read: list[int] = []
    for model in models:
        family.vision_tower(model).register_forward_hook(lambda _, inputs, given, __: read.append(len(given["grid_thw"])),
                                                          with_kwargs=True)
    took = {}
    for name, layout in (("once a step", batch), ("once a pass", batch), ("by sample", apart)):
        times = []
        for _ in range(repeats + 1):
            read.clear()
            start = time.perf_counter()
            step = embedded(layout, encoder) if name == "once a step" else layout
            reference.logprobs(step)
            actor.update(replace(step, old_logprobs=actor.logprobs(step)))
            times.append(time.perf_counter() - start)
        took[name] = statistics.median(times[1:])
        print(f"{name:12} {took[name]:6.2f} s, {sum(read)} images read")
    print(f"{took['by sample'] / took['once a step']:.1f} times as fast (target {TARGET})")


def embedded(batch, encoder):
    """The batch with its prompts' images encoded."""
    prompts = encoder.embed([group.prompt for group in batch.groups])
    return replace(batch, groups=[replace(group, prompt=prompt) for group, prompt in zip(batch.groups, prompts, strict=True)])


if __name__ == "__main__":
    main()
