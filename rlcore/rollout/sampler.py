"""The plain-torch sampler: slow, needs no engine, and the reference for engines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlcore.config.loader import validate
from rlcore.config.sections import LoraConfig, RolloutConfig, Strict
from rlcore.device import Backend
from rlcore.distributed.fingerprint import Constants, Fingerprint, compare, fingerprint
from rlcore.distributed.parts import published
from rlcore.errors import Remedy, RunError
from rlcore.model import lora as low_rank
from rlcore.model.routing import recorded
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.protocols import ModelFamily
from rlcore.runtime.memory import OffloadedTensors, awake, holding
from rlcore.types import Group, NamedTensors, Prompt, Receipt, Sample, Sampling

_ROWS = 256  # sequences decoded at a time
_ATTENTION = "rlcore_cached"
_REMEDY = "something in this process writes to the sampler's model: an adapter, a hook or a debugger"


class TorchOptions(Strict):
    """`rollout.options` of this sampler: there are none."""


def build(
    family: ModelFamily,
    folder: Path,
    backend: Backend,
    config: RolloutConfig,
    dtype: torch.dtype,
    max_tokens: int,
    seed: int,
    lora: LoraConfig | None = None,
    beat: Callable[[], None] = no_heartbeat,
    image_embeds: bool = False,
    temperatures: Mapping[str, float] | None = None,
    experts: bool = False,
) -> TorchRollout:
    """Build a sampler with its own copy of the weights, which changes at `load_weights` only."""
    validate(TorchOptions, config.options, "rollout.options.")
    model: Any = family.widen(_load(folder, dtype)).to(backend.device(0))
    return TorchRollout(model, family, max_tokens, lora, beat, experts)


class TorchRollout:
    """Samples from one model; prompts of equal length are decoded together.

    Log-probabilities are of the distribution drawn from: after temperature, top_p and top_k.
    """

    def __init__(
        self, model: Any, family: ModelFamily, max_tokens: int, lora: LoraConfig | None = None,
        beat: Callable[[], None] = no_heartbeat, experts: bool = False,
    ) -> None:
        """`experts`: samples come with the experts of their tokens."""
        self._model = model.eval().requires_grad_(False)
        self._family = family
        self._max_tokens = max_tokens
        self._stop = torch.tensor(sorted(family.stop_token_ids), device=model.device)
        self.version: int | None = 0
        self._lora = lora
        self._beat, self._experts = beat, experts
        self._asleep = False
        self._offloaded = OffloadedTensors(self._model.parameters)
        self._constants = Constants(self._model, _remade(self._model))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt. Each prompt has its own seed, so a call is repeatable, and other prompts change
        log-probabilities by rounding at most."""
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        awake(self._asleep, "sampling")
        holding(self.version)
        for places in _alike(prompts, max(1, _ROWS // sampling.samples)):
            with torch.inference_mode():
                groups = self._groups([prompts[place] for place in places], places, sampling)
            yield from zip(places, groups, strict=True)

    def pause(self) -> None:
        self._constants.note()
        self._asleep = True
        self._offloaded.pause()

    def resume(self) -> None:
        """Restore the weights; RunError names tensors that changed or are gone."""
        self._offloaded.resume()
        self._constants.check("waking the engine", _REMEDY)
        self._asleep = False

    def device_bytes(self) -> int:
        return self._offloaded.device_bytes()

    def relief(self) -> Sequence[Remedy]:
        """None: it has no settings."""
        return ()

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """RunError names the tensors that are missing, unknown or not what was sent."""
        awake(self._asleep, "a weight update")
        started, size = time.perf_counter(), 0
        self._constants.note()
        checking = time.perf_counter() - started
        self.version = None  # until the received weights are verified
        if self._lora:
            weights = self._make_room(dict(weights), self._lora)
        held, sent = self._weights(), {}
        with torch.no_grad():
            for name, tensor in weights:
                target = held.get(name)
                if target is not None and target.shape != tensor.shape:
                    shapes = f"was sent as {list(tensor.shape)}, the sampler holds {list(target.shape)}"
                    raise RunError(f"weight sync: {name} {shapes}; is this the served model?")
                tensor = tensor.detach() if target is None else tensor.detach().to(target.dtype)
                began = time.perf_counter()
                sent[name] = fingerprint(tensor)
                checking += time.perf_counter() - began
                size += tensor.nbytes
                if target is not None:
                    target.copy_(tensor)
        began = time.perf_counter()
        compare(sent, *self._held())
        self._constants.check(f"the update to version {version}", _REMEDY, updated=True)
        checking += time.perf_counter() - began
        self.version = version
        return Receipt(version, len(sent), size, time.perf_counter() - started, checking)

    def _make_room(self, lora_weights: dict[str, Tensor], lora: LoraConfig) -> NamedTensors:
        """Attach LoRA layers for the received weights if the model has none; returns the weights."""
        if not low_rank.has_lora(self._model):
            layers = sorted({name.rpartition(".lora_")[0] for name in lora_weights})
            places = [name for name, _ in self._model.named_modules() if self._family.hf_name(name) in layers]
            low_rank.attach(self._model, lora.model_copy(update={"targets": places}), skip=self._family.head(self._model))
        return lora_weights.items()

    def _weights(self) -> dict[str, Tensor]:
        """The served tensors, under the names that an actor sends."""
        if self._lora:
            return {self._family.hf_name(name): tensor for name, tensor in low_rank.lora_weights(self._model)}
        return dict(published(self._model.state_dict(keep_vars=True).items(), self._family.published))

    def _held(self) -> tuple[dict[str, Fingerprint], dict[str, str]]:
        """Fingerprints of all served tensors, and each tied name's owner."""
        owners: dict[int, str] = {}
        held, tied = {}, {}
        for name, tensor in self._weights().items():
            owner = owners.setdefault(id(tensor), name)
            held[name] = held[owner] if owner != name else fingerprint(tensor)
            if owner != name:
                tied[name] = owner
        return held, tied

    def _groups(self, prompts: Sequence[Prompt], places: Sequence[int], sampling: Sampling) -> list[Group]:
        generators = [torch.Generator().manual_seed(_seed(sampling.seed, sampling.first + place)) for place in places]
        with recorded(self._model, self._experts) as calls:
            steps = list(self._steps(prompts, sampling, generators))
        token_ids = torch.stack([tokens for tokens, _ in steps], dim=1).split(sampling.samples)  # [S, R], split by prompt
        logprobs = torch.stack([values for _, values in steps], dim=1).split(sampling.samples)
        experts = list(_routes(calls, len(prompts), sampling.samples)) if calls else [[None] * sampling.samples] * len(prompts)
        return [
            Group(prompt, [self._sample(*sample) for sample in zip(*drawn, strict=True)])
            for prompt, *drawn in zip(prompts, token_ids, logprobs, experts, strict=True)
        ]

    def _steps(
        self, prompts: Sequence[Prompt], sampling: Sampling, generators: Sequence[torch.Generator]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and log-probabilities [prompts x samples] of each step, until every sample has stopped."""
        logits, cache = _joined([self._family.prefill(self._model, prompt) for prompt in prompts])
        cache.batch_repeat_interleave(sampling.samples)
        logits = logits.repeat_interleave(sampling.samples, dim=0)
        positions = torch.tensor([prompt.next_position for prompt in prompts]).repeat_interleave(sampling.samples)
        running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        room = self._max_tokens - len(prompts[0].token_ids)
        tokens: Tensor | None = None
        for step in range(min(sampling.max_new_tokens, room)):
            if tokens is not None:
                logits = self._continue(tokens, cache, positions + step - 1)
            tokens, logprobs = draw(logits, sampling, generators)
            self._beat()
            yield tokens, logprobs
            running &= ~torch.isin(tokens, self._stop)
            if not running.any():
                return

    def _continue(self, tokens: Tensor, cache: Any, positions: Tensor) -> Tensor:
        """Decode one step: tokens [S] at positions [S] -> logits [S, V] after them."""
        positions = positions.to(tokens.device)[:, None]
        if self._model.config.get_text_config().rope_parameters.get("mrope_section"):
            positions = positions.expand(3, -1, -1)
        output = self._model(input_ids=tokens[:, None], position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits[:, -1]

    def _sample(self, token_ids: Tensor, logprobs: Tensor, experts: NDArray[np.integer] | None) -> Sample:
        """What was drawn up to the first stop: tokens [R], and the experts [P + R - 1, L, k] of what was read."""
        stops = torch.isin(token_ids, self._stop).nonzero()
        length = int(stops[0]) + 1 if len(stops) else len(token_ids)
        tokens, values = token_ids[:length].int().cpu().numpy(), logprobs[:length].clone().cpu().numpy()
        finish = "stop" if len(stops) else "length"
        if experts is not None:
            experts = experts[: len(experts) - len(token_ids) + length]
        return Sample(tokens, values, self._family.decode(tokens.tolist()), finish, holding(self.version), experts)


def _routes(calls: Sequence[NDArray[np.integer]], prompts: int, samples: int) -> Iterator[list[NDArray[np.integer]]]:
    """[P, L, k] of each prompt, then [prompts x samples, L, k] of each step -> of each prompt's samples [P + steps, L, k]."""
    read, steps = calls[:prompts], calls[prompts:]
    for number, prompt in enumerate(read):
        places = range(number * samples, (number + 1) * samples)
        yield [np.concatenate([prompt, *(step[place, None] for step in steps)]) for place in places]


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """logits [S, V] -> tokens [S] and their log-probabilities [S] float32; each generator draws an equal share of the rows.
    Temperature 0 is greedy."""
    logits = logits.float() / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logprobs.argmax(-1)
    else:
        logprobs = _truncated(logits, sampling.top_k, sampling.top_p).log_softmax(-1)
        shares = logprobs.exp().cpu().chunk(len(generators))
        drawn = [torch.multinomial(odds, 1, generator=one)[:, 0] for odds, one in zip(shares, generators, strict=True)]
        tokens = torch.cat(drawn).to(logits.device)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits outside the `top_k` likeliest, then those outside the `top_p` nucleus, to -inf."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        probabilities, order = logits.softmax(-1).sort(descending=True)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def _alike(prompts: Sequence[Prompt], most: int) -> Iterator[list[int]]:
    """Yield the indices of prompts of equal length, at most `most` at a time."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.token_ids), []).append(place)
    for places in by_length.values():
        yield from (places[first : first + most] for first in range(0, len(places), most))


def _joined(read: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Concatenate logits [1, V] and caches of prompts of equal length into one batch."""
    logits, caches = zip(*read, strict=True)
    for first, *others in zip(*(cache.layers for cache in caches), strict=True):
        first.keys = torch.cat([first.keys, *(layer.keys for layer in others)])
        first.values = torch.cat([first.values, *(layer.values for layer in others)])
    return torch.cat(logits), caches[0]


def folded(seed: int) -> int:
    """Fold a seed into 32 bits, all that torch's CPU generator reads, so that the upper bits count too."""
    return (seed ^ seed >> 32) % 2**32


def _seed(seed: int, place: int) -> int:
    return folded((seed * 1_000_003 + place) % 2**63)


def _remade(model: nn.Module) -> Iterator[Tensor]:
    """Rotary tables that transformers recomputes in the forward pass, for the longest sequence it has seen."""
    for layer in model.modules():
        if any(kind in str(getattr(layer, "rope_type", "")) for kind in ("dynamic", "longrope")):
            yield from layer.buffers(recurse=False)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a copy with the framework's own attention: the packed one of training has no key-value cache."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    vision = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    own = {"": "sdpa", "text_config": _ATTENTION, "vision_config": "sdpa"} if vision else _ATTENTION
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation=own, experts_implementation="eager")


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Any:
    """SDPA in the layer's dtype: float32 rotary tables widened queries and keys, and the cache its values to match."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (each.to(next(module.parameters()).dtype) for each in (query, key, value))
    return sdpa_attention_forward(module, query, key, value, *others, **options)
