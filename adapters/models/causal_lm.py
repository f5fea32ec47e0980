"""Text families of transformers with a `model` and an `lm_head`: Llama, Qwen2, Qwen3."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlcore.distributed.ulysses import Slice
from rlcore.errors import ConfigError
from rlcore.model.attention import NAME as PACKED_ATTENTION
from rlcore.model.packing import alone
from rlcore.model.precision import lookup, wide_tables
from rlcore.types import Packed, Prompt, Row

from .chat_template import ChatTemplate

GENERATION_CONFIG = "generation_config.json"


class CausalLM:
    """Text family (`rlcore.protocols.ModelFamily`). The tokenizer comes from `folder`; ConfigError when it has none."""

    model_class: ClassVar[Any] = AutoModelForCausalLM
    processor_class: ClassVar[Any] = AutoTokenizer
    attention: ClassVar[str | Mapping[str, str]] = PACKED_ATTENTION
    image_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        self.processor = _open_processor(self.processor_class, folder)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        _check_vocabulary(self.tokenizer, folder)
        self._generation_config = _generation_config(folder)
        self.stop_token_ids = _stop_token_ids(self.tokenizer.eos_token_id, self._generation_config, folder)
        eos = self.tokenizer.eos_token_id
        self._end = min(self.stop_token_ids) if eos is None else eos
        self._template = ChatTemplate(self.processor, self.tokenizer.convert_ids_to_tokens(self._end))

    def load(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Load the model without dropout and with packed attention; ConfigError when weights are missing or misshapen."""
        try:
            model, report = self.model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=self.attention, experts_implementation="eager",
                output_loading_info=True, ignore_mismatched_sizes=True,
            )
        except (ImportError, OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(f"model.path: {folder} does not load: {_one_line(error)}") from error
        _check_tensors(report, folder)
        return self.widen(_ready(model, folder))

    def meta_model(self, folder: Path, dtype: torch.dtype) -> nn.Module:
        """`load` on the meta device. A head that should be tied to the embedding but is stored with other values stays untied,
        as in `load`."""
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            model = self.model_class.from_config(
                config, dtype=dtype, attn_implementation=self.attention, experts_implementation="eager"
            )
        for target, source in list(model.all_tied_weights_keys.items()):
            if _stored_apart(folder, self.hf_name(target), self.hf_name(source)):
                del model.all_tied_weights_keys[target]
        model.tie_weights(recompute_mapping=False)
        return self.widen(_ready(model.eval(), folder))

    def use_template(self, template: str | None, options: Mapping[str, Any]) -> None:
        """Also in the folders that `save_processor` writes; the variables are not saved."""
        self._template.use(template, options)

    def prompt_length(self, row: Row) -> int:
        """P of `encode`, without decoding images."""
        row = _asked(row)
        return int(self._widths(row, self._read(row)[1]).sum())

    def encode(self, row: Row) -> Prompt:
        """Apply the chat template with the generation prompt, and tokenize. Without a template: the messages, one per line.

        ConfigError names a row with images.
        """
        row = _asked(row)
        return self._prompt(row, *self._read(row))

    def encode_conversation(self, row: Row) -> list[Prompt]:
        """One sequence, or several where the template changes a turn once others follow. Turns are tokenized one by one, as
        when they are sampled; nothing follows the last one's end."""
        prompts = []
        for text, token_ids, written in self._sequences(row):
            prompt = self._prompt(row, text, token_ids)
            places = np.flatnonzero(np.repeat(written, self._widths(prompt.row, token_ids)))
            prompts.append(replace(prompt, imitated=places))
        return prompts

    def conversation_length(self, row: Row) -> int:
        """Tokens of the longest sequence of `encode_conversation`, without decoding images."""
        return max(int(self._widths(row, token_ids).sum()) for _, token_ids, _ in self._sequences(row))

    def encode_response(self, text: str) -> list[int]:
        """Tokens of a complete response: the text, then the end-of-turn token."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self._end]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def hidden(self, model: Any, packed: Packed, part: Slice | None = None) -> Tensor:
        """[t, D]: last hidden states after the final norm, on the model's device."""
        part = part or Slice(packed.tokens)
        inputs = self._inputs(model, packed, part)
        return self._decoder(model)(**inputs, segments=packed.segments, part=part, use_cache=False).last_hidden_state[0]

    def prefill(self, model: Any, prompt: Prompt) -> tuple[Tensor, Any]:
        """[1, V] logits after the prompt, and its key-value cache."""
        inputs = self._inputs(model, alone(prompt), Slice(len(prompt.token_ids)))
        output = self._decoder(model)(**inputs, use_cache=True)
        return model.get_output_embeddings()(output.last_hidden_state[:, -1]), output.past_key_values

    def blocks(self, model: Any) -> Sequence[nn.Module]:
        """The decoder layers, in order."""
        return self._decoder(model).layers

    def head(self, model: Any) -> Tensor:
        """[V, D]: the output head's weight."""
        return model.lm_head.weight

    def vision_tower(self, model: Any) -> nn.Module | None:
        return None

    def hf_name(self, name: str) -> str:
        """Hugging Face name (of `save_pretrained` and the hub) of the tensor that state_dict() calls `name`."""
        return name

    def published(self, name: str, shape: Sequence[int]) -> Mapping[str, Sequence[int]]:
        return {self.hf_name(name): shape}

    def widen(self, model: nn.Module) -> nn.Module:
        return wide_tables(model)

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer (and processor) files beside the weights of `save_pretrained`; generation_config.json is copied
        unchanged, or removed where the source had none."""
        self.processor.save_pretrained(folder)
        path = folder / GENERATION_CONFIG
        path.unlink(missing_ok=True)
        if self._generation_config is not None:
            path.write_bytes(self._generation_config)

    def opening(self, row: Row) -> str:
        """The generation prompt that the chat template adds after the row's last message; empty without a template."""
        messages = self._messages(_asked(row))
        return self._template.render(messages, row.id).removeprefix(self._template.render(messages, row.id, generation=False))

    def _decoder(self, model: Any) -> Any:
        """The text model without its head."""
        return model.model

    def _inputs(self, model: Any, packed: Packed, part: Slice) -> dict[str, Any]:
        """Arguments of the decoder for this rank's tokens of a row, on the model's device."""
        token_ids = part.cut(packed.input_ids).to(model.device)
        return {
            "inputs_embeds": lookup(model.get_input_embeddings().weight, token_ids)[None],
            "position_ids": part.cut(packed.position_ids)[None].to(model.device),
        }

    def _read(self, row: Row) -> tuple[str, list[int]]:
        """Prompt text and tokens, one placeholder per image."""
        text = self._template.render(self._messages(row), row.id)
        return text, self._tokens(text, beginning=True)

    def _tokens(self, text: str, beginning: bool) -> list[int]:
        """Tokens of a text; at the `beginning` of a sequence also the special ones that no chat template wrote."""
        return self.tokenizer(text, add_special_tokens=beginning and not self._template.is_set)["input_ids"]

    def _sequences(self, row: Row) -> Iterator[tuple[str, list[int], list[bool]]]:
        """Yield text, tokens (one placeholder per image), and which of them the assistant wrote, for each sequence of a
        conversation."""
        messages = [*row.messages, {"role": "assistant", "content": row.target}, *row.rest]
        rendered = self._messages(replace(row, messages=messages, rest=()))
        for pieces in self._template.pieces(rendered, row.id):
            token_ids, written = list[int](), list[bool]()
            for piece in pieces:
                tokens = self.encode_response(piece.text) if piece.written else self._tokens(piece.text, not token_ids)
                token_ids += tokens
                written += [piece.written] * len(tokens)
            yield "".join(piece.text for piece in pieces), token_ids, written

    def _prompt(self, row: Row, text: str, token_ids: list[int]) -> Prompt:
        """`token_ids` have one placeholder per image."""
        return Prompt(row, token_ids, token_ids, text=text)

    def _widths(self, row: Row, token_ids: Sequence[int]) -> NDArray[np.int64]:
        """Tokens of the model for each of these, which have one placeholder per image."""
        return np.ones(len(token_ids), np.int64)

    def _messages(self, row: Row) -> list[Mapping[str, Any]]:
        """The row's messages for the chat template: in text families each content is one string."""
        if row.images or image_parts(row):
            raise ConfigError(
                f"{row.id}: the row has {max(len(row.images), image_parts(row))} images but the model reads text only;"
                " use a vision-language model or a data set without images"
            )
        return [{**message, "content": _text(message["content"])} for message in row.messages]


def _ready(model: Any, folder: Path) -> Any:
    """Make the model savable and its config match its (un)tied head; ConfigError for sliding-window attention."""
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ConfigError(
            f"model.path: {folder} uses sliding-window attention, which packed rows do not support; where its window covers"
            " your longest sample, set use_sliding_window to false in its config.json"
        )
    model.generation_config = GenerationConfig()  # `save_pretrained` refuses many that folders hold; see `save_processor`
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


def image_parts(row: Row) -> int:
    """Number of image parts in the row's messages."""
    contents = [message["content"] for message in row.messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


def _asked(row: Row) -> Row:
    """The row with the images of its prompt only."""
    return replace(row, images=row.images[: image_parts(row)], rest=()) if row.rest else row


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _check_tensors(report: Mapping[str, Any], folder: Path) -> None:
    """ConfigError for missing or misshapen tensors, which transformers fills with random numbers."""
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model.path: the weights in {folder} lack {len(missing)} tensors of this architecture ({_few(missing)});"
            " is the folder complete?"
        )
    if misshapen := sorted(report["mismatched_keys"]):
        shapes = [f"{name} is {list(saved)}, not {list(wanted)}" for name, saved, wanted in misshapen]
        raise ConfigError(
            f"model.path: {len(misshapen)} tensors in {folder} have other shapes than its config.json says ({_few(shapes, 1)});"
            " do both come from one model?"
        )


def _stored_apart(folder: Path, first: str, second: str, rows: int = 4096) -> bool:
    """Whether the weight files hold both tensors, with different values. Reads `rows` rows at a time."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    places = {name: file for file in files for name in file.keys()}
    if not {first, second} <= places.keys():
        return False
    one, other = (places[name].get_slice(name) for name in (first, second))
    starts = range(0, one.get_shape()[0], rows)
    return not all(torch.equal(one[start : start + rows], other[start : start + rows]) for start in starts)


def _open_processor(processor_class: Any, folder: Path) -> Any:
    try:
        return processor_class.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.path: {folder} has no usable tokenizer or processor files ({_one_line(error)});"
            " copy tokenizer.json and its companions from the model the weights come from"
        ) from error


def _check_vocabulary(tokenizer: Any, folder: Path) -> None:
    """ConfigError for a tokenizer with tokens that the embedding has no row for. Rows without a token are common."""
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    token, last = max(tokenizer.get_vocab().items(), key=itemgetter(1))
    if last >= rows:
        raise ConfigError(
            f"model.path: the tokenizer in {folder} goes up to token {last} ({token!r}), the model's {rows} embedding rows to"
            f" {rows - 1}; give the tokenizer that the weights came with, or weights that were resized for this one"
        )


def _generation_config(folder: Path) -> bytes | None:
    path = folder / GENERATION_CONFIG
    return path.read_bytes() if path.is_file() else None


def _stop_token_ids(tokenizer_eos: int | None, generation_config: bytes | None, folder: Path) -> frozenset[int]:
    """The tokenizer's end-of-sequence token and those of generation_config.json."""
    try:
        listed = json.loads(generation_config or b"{}").get("eos_token_id")
    except (ValueError, AttributeError) as error:
        path = folder / GENERATION_CONFIG
        raise ConfigError(f"model.path: {path} is not a JSON object: {error}; restore the model's own or remove it") from None
    listed = listed if isinstance(listed, list) else [listed]
    tokens = frozenset(token for token in (tokenizer_eos, *listed) if token is not None)
    if not tokens:
        raise ConfigError(f"model.path: {folder} names no end-of-turn token; set eos_token in its tokenizer_config.json")
    return tokens


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _few(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
