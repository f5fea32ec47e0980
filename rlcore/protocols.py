"""Protocols of roles, model families, engines and launchers; rlcore/device.py has that of devices. Plugins implement these; the
trainer uses nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from rlcore.errors import Remedy
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.types import Batch, Group, Metrics, NamedTensors, Prompt, Receipt, Row, Sampling, Score, Vision

if TYPE_CHECKING:
    from rlcore.checks import CheckResult
    from rlcore.config.sections import LoraConfig, RolloutConfig
    from rlcore.device import Backend
    from rlcore.distributed.snapshot import Snapshot
    from rlcore.distributed.ulysses import Slice
    from rlcore.types import Packed


class Reference(Protocol):
    def logprobs(self, batch: Batch) -> Tensor:
        """[N] float32: log p(token | preceding tokens), packed order."""
        ...


class Actor(Reference, Protocol):
    def update(self, batch: Batch) -> Metrics:
        """Take all optimizer steps of this batch; returns their metrics."""
        ...

    def weights(self) -> NamedTensors: ...

    def save(self, snapshot: Snapshot) -> None:
        """Add everything needed to resume training; the checkpoint's `model` is a Hugging Face folder."""
        ...

    def load(self, folder: Path) -> None: ...


class Critic(Protocol):
    def values(self, batch: Batch) -> Tensor:
        """[N] float32: the expected return before each token."""
        ...

    def update(self, batch: Batch) -> Metrics: ...

    def save(self, snapshot: Snapshot) -> None: ...

    def load(self, folder: Path) -> None: ...


class Encoder(Protocol):
    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Replace pixel_values by image_embeds; prompts stay in order."""
        ...


class Rollout(Protocol):
    @property
    def version(self) -> int | None:
        """Version of the served weights: 0 before any `load_weights`, None after a failed one or a pause that discards them."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Sample one group per prompt, in the order of the prompts."""
        ...

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """Yield (prompt index, group) as groups finish. A run's prompts come without the messages and columns of their rows,
        and without images once those are embedded."""
        ...

    def pause(self) -> None:
        """Free the device; until `resume` every other call raises PhaseError. The weights may have to be sent again."""
        ...

    def resume(self) -> None: ...

    def device_bytes(self) -> int: ...

    def relief(self) -> Sequence[Remedy]:
        """Settings with which the engine would need less memory, the mildest first; asked for when there is not enough."""
        ...

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """Serve these weights from now on; RunError when what the engine holds is not what was sent."""
        ...


class Reward(Protocol):
    def score(self, groups: Sequence[Group]) -> list[list[Score]]: ...


class ModelFamily(Protocol):
    """A model family."""

    stop_token_ids: frozenset[int]  # the tokens that end a turn
    image_options: Mapping[str, Any]  # settings of the Hugging Face image processor other than the folder's, for engines too

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module: ...

    def meta_model(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Build the model with parameters on the meta device: shapes without memory."""
        ...

    def use_template(self, template: str | None, options: Mapping[str, Any]) -> None:
        """Render messages with this chat template (a .jinja file or its text; None is the model's own) and these variables."""
        ...

    def prompt_length(self, row: Row) -> int:
        """Number of tokens `encode` will give, without touching pixels."""
        ...

    def encode(self, row: Row) -> Prompt: ...

    def encode_conversation(self, row: Row) -> list[Prompt]:
        """The whole conversation of a row (messages, target, rest) in one sequence or several, each with the indices of its
        tokens to imitate: those of the assistant's turns, each with its end, once in all."""
        ...

    def conversation_length(self, row: Row) -> int:
        """Number of tokens of the longest sequence of `encode_conversation`, without touching pixels."""
        ...

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
        """[T, D]: the last hidden states of a packed row, after the final norm; [t, D] of a slice, on all its ranks."""
        ...

    def prefill(self, model: nn.Module, prompt: Prompt) -> tuple[Tensor, Any]:
        """Logits [1, V] after a prompt, and its key-value cache; the model has attention that fills one."""
        ...

    def vision_tower(self, model: nn.Module) -> nn.Module | None: ...

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The decoder layers, in order."""
        ...

    def head(self, model: nn.Module) -> Tensor:
        """[V, D]: the output projection (the embedding itself where they are tied)."""
        ...

    def hf_name(self, name: str) -> str:
        """The Hugging Face name of a parameter or layer of the loaded model."""
        ...

    def published(self, name: str, shape: Sequence[int]) -> Mapping[str, Sequence[int]]:
        """Names and shapes of the tensors that Hugging Face files have in place of the loaded model's tensor `name`
        (`rlcore.distributed.parts.Published`). Several where transformers fuses them: the experts of a layer."""
        ...

    def widen(self, model: nn.Module) -> nn.Module:
        """Make transformers' model compute in float32, whatever its dtype, what is not robust to rounding."""
        ...

    def save_processor(self, folder: Path) -> None:
        """Save the tokenizer and processor files beside the weights."""
        ...


class VisionModelFamily(ModelFamily, Protocol):
    """A model family with a vision tower. Its constructor takes `min_pixels` and `max_pixels` of an image if it can scale
    images to them."""

    def embed_images(self, tower: nn.Module, vision: Vision) -> Sequence[Tensor]:
        """[tokens, ...] of each image: all that the text model is given of it, in the form that engines take too. `vision` has
        the pixels of one prompt's images or of several prompts' together."""
        ...


class Engine(Protocol):
    """Builds a Rollout. Registered by name; `rollout.engine` chooses."""

    def __call__(
        self, *, family: ModelFamily, folder: Path, backend: Backend, config: RolloutConfig, dtype: torch.dtype,
        max_tokens: int, seed: int, lora: LoraConfig | None = None, beat: Callable[[], None] = no_heartbeat,
        image_embeds: bool = False, temperatures: Mapping[str, float] | None = None, experts: bool = False,
    ) -> Rollout:
        """With `lora`, `load_weights` gets only LoRA weights, over the base weights of `folder`. The engine calls the heartbeat
        `beat` at each of its steps, so that a long generation is not taken for a hang. With `image_embeds`, prompts come with
        their images embedded. `temperatures`, by setting, are those it will be asked for: ConfigError for one at which it would
        not sample. With `experts`, samples come with the experts of their tokens: ConfigError from an engine that cannot."""
        ...


class Dataset(Protocol):
    """Rows of a published or generated data set. Registered by name; `data.train.name` chooses."""

    def __call__(self, path: Path | None, **options: Any) -> Sequence[Row]: ...


class Launcher(Protocol):
    """Connects the nodes of a run, each of which starts one; registered by name."""

    Options: ClassVar[type[BaseModel]]  # every field is an option of `rlcore launch` under its alias, an environment variable

    def __init__(self, given: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Options by alias: those `given`, then those of the environment."""
        ...

    @classmethod
    def check_results(cls, environment: Mapping[str, str]) -> Iterator[CheckResult]:
        """Checks of this node for `rlcore doctor`, before torch is imported."""
        ...

    @property
    def devices(self) -> int | None:
        """Number of devices of all nodes; None in a cluster that this launcher does not start."""
        ...

    def run(self, trainer: Sequence[str], backend: Backend) -> int:
        """Run the command once, where all nodes' devices can be reached; returns its exit status on every node."""
        ...
