"""What a role, a model family, an engine and a launcher must offer; rlcore/device.py says it of a device. Plugins implement
these; the trainer knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.types import Batch, Group, Metrics, NamedTensors, Prompt, Receipt, Row, Sampling, Score, Vision

if TYPE_CHECKING:
    from rlcore.checks import CheckResult
    from rlcore.config.sections import LoraConfig, RolloutConfig
    from rlcore.device import Backend
    from rlcore.distributed.ulysses import Slice
    from rlcore.types import Packed



class Reference(Protocol):
    def logprobs(self, batch: Batch) -> Tensor:
        """[N] float32: log p(token | what stands before it), packed order."""
        ...


class Actor(Reference, Protocol):
    def update(self, batch: Batch) -> Metrics:
        """All optimizer steps of this batch."""
        ...

    def weights(self) -> NamedTensors: ...

    def save(self, folder: Path) -> None:
        """Everything needed to go on training, into an empty folder; `folder/model` is a Hugging Face folder."""
        ...

    def load(self, folder: Path) -> None: ...


class Critic(Protocol):
    def values(self, batch: Batch) -> Tensor:
        """[N] float32: what the response was expected to earn, before each token."""
        ...

    def update(self, batch: Batch) -> Metrics: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Encoder(Protocol):
    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts in order, their images read: image_embeds in place of pixel_values."""
        ...


class Rollout(Protocol):
    @property
    def version(self) -> int | None:
        """Of the weights it serves: 0 before the first `load_weights`, None after a failed one or a pause that gave them up."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group a prompt, in the order of the prompts."""
        ...

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """The same groups, each as soon as it is finished, with the place of its prompt. A run's prompts come without the
        messages and columns of their rows, and without images once those have been read."""
        ...

    def pause(self) -> None:
        """Leave the device; until `resume` everything else is a PhaseError. The weights may have to be sent again."""
        ...

    def resume(self) -> None: ...

    def device_bytes(self) -> int: ...

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """Serve these weights from now on; RunError when what the engine holds is not what was sent."""
        ...


class Reward(Protocol):
    def score(self, groups: Sequence[Group]) -> list[list[Score]]: ...


class ModelFamily(Protocol):
    """A model family."""

    stop_token_ids: frozenset[int]  # the tokens that end a turn

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module: ...

    def meta_model(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The same model whose parameters have shapes but no memory."""
        ...

    def prompt_length(self, row: Row) -> int:
        """The tokens `encode` will give, without touching pixels."""
        ...

    def encode(self, row: Row) -> Prompt: ...

    def opening(self, row: Row) -> str:
        """The text between the row's last message and the response: a turn's header, and a tag that it leaves open."""
        ...

    def encode_response(self, text: str) -> list[int]:
        """The tokens of a whole response, end-of-turn token included."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Response tokens as text, special tokens left out."""
        ...

    def hidden(self, model: nn.Module, packed: Packed, part: Slice | None = None) -> Tensor:
        """[T, D]: the last hidden states of a packed row, after the final norm; [t, D] of a slice, called by its group."""
        ...

    def embedded(self, model: nn.Module, prompt: Prompt) -> Tensor:
        """[P, D]: what the first layer reads of a prompt, images in their places."""
        ...

    def vision_tower(self, model: nn.Module) -> nn.Module | None: ...

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers, in order."""
        ...

    def head(self, model: nn.Module) -> Tensor:
        """[V, D]: the output projection (the embedding itself where they are tied)."""
        ...

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a parameter of the loaded model."""
        ...

    def save_processor(self, folder: Path) -> None:
        """The tokenizer and processor files beside saved weights."""
        ...


class VisionModelFamily(ModelFamily, Protocol):
    """A model family with a vision tower."""

    def embed_images(self, tower: nn.Module, vision: Vision) -> Sequence[Tensor]:
        """[tokens, D] of each image, from its pixels; `vision` is that of one prompt or of several together."""
        ...


class Engine(Protocol):
    """Builds a Rollout. Registered by name; `rollout.engine` chooses."""

    def __call__(
        self, *, family: ModelFamily, folder: Path, backend: Backend, config: RolloutConfig, dtype: torch.dtype,
        max_tokens: int, seed: int, lora: LoraConfig | None = None, beat: Callable[[], None] = no_heartbeat,
        image_embeds: bool = False, temperatures: Mapping[str, float] | None = None,
    ) -> Rollout:
        """With `lora`, `load_weights` is sent the additions alone, over the weights of `folder`. The engine calls `beat` at
        each of its steps, so that a long answer is not taken for one that never comes. With `image_embeds`, prompts come with
        their images read. `temperatures` are what it will be asked for, by setting: ConfigError for one at which it would not
        sample."""
        ...


class Dataset(Protocol):
    """Rows of a published or generated data set. Registered by name; `data.train.name` chooses."""

    def __call__(self, path: Path | None, **options: Any) -> Sequence[Row]: ...


class Launcher(Protocol):
    """Brings the nodes of a run together, each of which starts one; registered by name."""

    Options: ClassVar[type[BaseModel]]  # every field is an option of `rlcore launch` under its alias, an environment variable

    def __init__(self, given: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Options by alias: what was given, then what the environment says."""
        ...

    @classmethod
    def check_results(cls, environment: Mapping[str, str]) -> Iterator[CheckResult]:
        """What of this node `rlcore doctor` looks at, before torch is imported."""
        ...

    @property
    def devices(self) -> int | None:
        """Of all nodes together; None when they are not this launcher's."""
        ...

    def run(self, trainer: Sequence[str], backend: Backend) -> int:
        """Runs the command once, where the nodes' devices can be reached; its exit status, on every node."""
        ...
