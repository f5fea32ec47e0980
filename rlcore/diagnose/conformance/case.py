"""Test cases: two small models with known weights, and a batch for each; identical on every machine and device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlcore import registry
from rlcore.algorithms.loss import objective
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.device import Backend
from rlcore.distributed.fsdp import Sharding
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.loading import model_type
from rlcore.model.optimizer import ADAMW
from rlcore.protocols import ModelFamily
from rlcore.types import Batch, Group, Row, Sample

SOURCES = {"text": "tiny_qwen3", "vision": "tiny_qwen2_5_vl"}
SIZES = {"hidden_size": 128, "layers": 2, "heads": 2, "key_value_heads": 1}  # head size 64, which every engine has kernels for
ALGORITHM = AlgorithmConfig(kl_coef=0.1, entropy_coef=0.01)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, max_grad_norm=1e9)
TEMPERATURE = 0.9
STEPS = 3
LONGEST = 12  # tokens of a response
CAP = 96  # tokens of a packed row: the two groups make several rows rows


@dataclass(frozen=True)
class Case:
    """A model folder, its family, and a batch with every input of a loss."""

    folder: Path
    family: ModelFamily
    batch: Batch

    @property
    def mark(self) -> str:
        """Hash of weights and inputs: numbers can only be compared where it is equal."""
        digest = hashlib.sha256()
        for _, tensor in sorted(load_file(self.folder / "model.safetensors").items()):  # a tower's names vary by version
            digest.update(tensor.numpy().tobytes())
        for numbers in (self.batch.old_logprobs, self.batch.ref_logprobs, self.batch.advantages):
            digest.update(_rounded(numbers))
        for group in self.batch.groups:
            digest.update(repr((group.prompt.token_ids, [sample.token_ids.tolist() for sample in group.samples])).encode())
            for pixels in (group.prompt.vision or {}).values():
                digest.update(_rounded(pixels))
        return digest.hexdigest()[:16]

    def actor(
        self, device: torch.device, dtype: torch.dtype, backend: Backend | None = None, sharding: Sharding | None = None
    ) -> TorchActor:
        """Build an actor as in a run; without a backend, in plain torch."""
        model = self.family.load(self.folder, torch.float32).to(device)
        loaded = LoadedModel(backend.fuse(model) if backend else model, self.family, sharding)
        return TorchActor(
            loaded, ForwardSettings(device, dtype, CAP, TEMPERATURE), objective(ALGORITHM, LONGEST), OPTIMIZER,
            MinibatchSchedule(STEPS), backend.adamw if backend else ADAMW,
        )  # fmt: skip


def make(kind: str, folder: Path) -> Case:
    """Create a case of `SOURCES` in `folder`."""
    registry.load("models", SOURCES[kind])(folder, **SIZES)
    _rewrite(folder / "model.safetensors")
    family = registry.load("families", model_type(folder))(folder)
    return Case(folder, family, _batch(family, with_images=kind == "vision"))


def _rewrite(file: Path) -> None:
    """Redraw the weights, from one generator in the order of names, so that the model's outputs vary."""
    random = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=random)
        return noise / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 1 + 0.1 * noise

    save_file({name: drawn(tensor) for name, tensor in sorted(load_file(file).items())}, file, {"format": "pt"})


def _batch(family: ModelFamily, with_images: bool) -> Batch:
    """Two prompts with three and two responses, one of which is masked out."""
    random = torch.Generator().manual_seed(1)

    def near(values: Tensor, width: float) -> Tensor:
        return values + width * torch.randn(len(values), generator=random)

    groups = []
    for number, (text, samples) in enumerate((("What is 12 + 30?", 3), ("How many circles?", 2))):
        image = {"type": "image"}
        content = [image, {"type": "text", "text": text}] if with_images else text
        row = Row(f"row {number}", [{"role": "user", "content": content}], images=[_picture(number)] if with_images else [])
        lengths = torch.randint(3, LONGEST + 1, (samples,), generator=random).tolist()
        ids = [torch.randint(8, 256, (length,), generator=random).int().numpy() for length in lengths]
        responses = [Sample(each, numpy.zeros(len(each), numpy.float32), "", "stop", 0) for each in ids]
        groups.append(Group(family.encode(row), responses))
    batch = Batch.of(groups)
    old = near(torch.full((len(batch.loss_mask),), -6.0), 0.5)
    advantages, counts = torch.randn(len(batch.lengths), generator=random), torch.arange(len(batch.lengths)) != 1
    return replace(
        batch, old_logprobs=old, rollout_logprobs=near(old, 0.05), ref_logprobs=near(old, 0.2), kl_coef=ALGORITHM.kl_coef,
        advantages=batch.per_token(advantages), loss_mask=batch.per_token(counts),
    )  # fmt: skip


def _rounded(numbers: Tensor | None) -> bytes:
    assert numbers is not None
    return (numbers * 100).round().long().numpy().tobytes()


def _picture(number: int) -> Image.Image:
    """Image of 56 x 84 pixels, six tokens; an image processor keeps this size."""
    picture = Image.new("RGB", (56, 84))
    picture.putdata([(x * 4, y * 3, (x * y * (number + 1)) % 256) for y in range(84) for x in range(56)])
    return picture
