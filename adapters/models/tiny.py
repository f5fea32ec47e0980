"""Tiny models with random weights, made offline: real architectures, small enough to train on a laptop.

Each function writes a complete Hugging Face folder: configuration, fp32 safetensors, tokenizer, and processor for vision.
The same options give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlcore.errors import ConfigError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS_AS_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")
VOCABULARY = 576
IMAGE_UNIT = 28  # side in pixels of one image token of Qwen2-VL and Qwen2.5-VL: patches of 14, merged 2 by 2
IMAGE_UNIT_3 = 32  # of Qwen3-VL: patches of 16
POSITIONS = 64  # positions that a tiny Qwen3-VL's tower learns: a grid of 8 by 8, stretched over an image's patches

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "system user assistant",
    "You are a helpful assistant. Think step by step, then answer the question.",
    "How many circles are there in the figure? How many squares are there? How many triangles are there?",
    "How many sides does the polygon have? How many corners does this shape have? How many figures can you see?",
    "What is the number of red circles in the image? Count the blue squares, the green triangles and the yellow stars.",
    "In the figure, find the length of the side. Find the measure of the angle. What is the area of the triangle?",
    "What is the perimeter of the rectangle? Find the radius of the circle. Find x. Choose A, B, C or D.",
    "The figure shows a triangle, a square, a rectangle, a circle, a pentagon, a hexagon, a heptagon and an octagon.",
    "What is the sum of the two numbers? What is the difference? What is the product? Compute the result.",
    "Calculate: 1 + 2 = 3, 4 - 5 = -1, 6 * 7 = 42, 8 / 2 = 4. What is 9 plus 0? What is 5 minus 3? What is 2 times 4?",
    "Solve the problem. How many are left? How much money does she have in total? How many did he sell altogether?",
    "Give the answer as a number. Answer with a single number inside the tags. Put the final answer in \\boxed{ }.",
    "Let us think step by step. First, there are two. Then, there are three. So the answer is five. Therefore, the answer is",
    "zero one two three four five six seven eight nine ten eleven twelve",
)


def tiny_llama(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True,
) -> None:
    """A Llama, 0.7 million parameters by default. `context` is the longest sample in tokens; `tied` shares the head with the
    embedding."""
    text = _text_config(hidden_size, layers, heads, key_value_heads, context)
    _write_text_model(folder, seed, LlamaForCausalLM, LlamaConfig, text, tied)


def tiny_qwen3(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True,
) -> None:
    """A Qwen3, 0.7 million parameters by default."""
    text = _text_config(hidden_size, layers, heads, key_value_heads, context)
    _write_text_model(folder, seed, Qwen3ForCausalLM, Qwen3Config, {**text, "head_dim": hidden_size // heads}, tied)


def tiny_qwen3_moe(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True, experts: PositiveInt = 8,
    experts_per_token: PositiveInt = 2, expert_size: PositiveInt = 64,
) -> None:
    """A Qwen3-MoE, 1.1 million parameters by default. `experts_per_token` of a layer's `experts` work on a token; each has
    `expert_size` intermediate features."""
    if experts_per_token > experts:
        raise ConfigError(f"model.options.experts_per_token: {experts_per_token} is more than experts {experts}; lower it")
    text = _text_config(hidden_size, layers, heads, key_value_heads, context) | {"head_dim": hidden_size // heads}
    text |= {
        "num_experts": experts, "num_experts_per_tok": experts_per_token, "moe_intermediate_size": expert_size,
        "norm_topk_prob": True,
    }  # fmt: skip
    _write_text_model(folder, seed, Qwen3MoeForCausalLM, Qwen3MoeConfig, text, tied)


def tiny_qwen2_5_vl(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True, vision_hidden_size: PositiveInt = 64,
    vision_layers: PositiveInt = 4, vision_heads: PositiveInt = 4, min_pixels: PositiveInt = 4 * IMAGE_UNIT**2,
    max_pixels: PositiveInt = 64 * IMAGE_UNIT**2,
) -> None:
    """A Qwen2.5-VL, 1.0 million parameters by default. An image is scaled to between `min_pixels` and `max_pixels` and takes
    one token for each 28 by 28 of them: 112 by 112 pixels are 16 tokens."""
    from transformers import (  # here: they need torchvision, and text does not
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tower = _tower_config(vision_hidden_size, vision_layers, vision_heads, IMAGE_UNIT)
    tower |= {
        "hidden_size": vision_hidden_size, "intermediate_size": 2 * vision_hidden_size, "out_hidden_size": hidden_size,
        "window_size": 112, "fullatt_block_indexes": list(range(1, vision_layers, 2)),
    }  # fmt: skip
    text = _text_config(hidden_size, layers, heads, key_value_heads, context) | _three_axes(hidden_size // heads // 2, 3 / 8)
    images = Qwen2VLImageProcessor(**_limits(min_pixels, max_pixels))
    processor = Qwen2_5_VLProcessor(images, _tokenizer(), Qwen2VLVideoProcessor(), CHAT_TEMPLATE)
    _write_vision_model(folder, seed, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, text, tower, processor, tied)


def tiny_qwen2_vl(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True, vision_hidden_size: PositiveInt = 64,
    vision_layers: PositiveInt = 4, vision_heads: PositiveInt = 4, min_pixels: PositiveInt = 4 * IMAGE_UNIT**2,
    max_pixels: PositiveInt = 64 * IMAGE_UNIT**2,
) -> None:
    """A Qwen2-VL, 1.0 million parameters by default; its images are those of `tiny_qwen2_5_vl`."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tower = _tower_config(vision_hidden_size, vision_layers, vision_heads, IMAGE_UNIT)
    tower |= {"embed_dim": vision_hidden_size, "mlp_ratio": 2, "hidden_size": hidden_size}
    text = _text_config(hidden_size, layers, heads, key_value_heads, context) | _three_axes(hidden_size // heads // 2, 3 / 8)
    images = Qwen2VLImageProcessor(**_limits(min_pixels, max_pixels))
    processor = Qwen2VLProcessor(images, _tokenizer(), Qwen2VLVideoProcessor(), CHAT_TEMPLATE)
    _write_vision_model(folder, seed, Qwen2VLForConditionalGeneration, Qwen2VLConfig, text, tower, processor, tied)


def tiny_qwen3_vl(
    folder: Path, *, seed: NonNegativeInt = 0, hidden_size: PositiveInt = 128, layers: PositiveInt = 4, heads: PositiveInt = 4,
    key_value_heads: PositiveInt = 2, context: PositiveInt = 2048, tied: bool = True, vision_hidden_size: PositiveInt = 64,
    vision_layers: PositiveInt = 4, vision_heads: PositiveInt = 4, min_pixels: PositiveInt = 4 * IMAGE_UNIT_3**2,
    max_pixels: PositiveInt = 64 * IMAGE_UNIT_3**2,
) -> None:
    """A Qwen3-VL, 1.2 million parameters by default. 128 by 128 pixels are 16 tokens. Every other layer of the tower gives
    features to a layer of the text model, but none to the last, after which no token reads another."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tower = _tower_config(vision_hidden_size, vision_layers, vision_heads, IMAGE_UNIT_3)
    tower |= {
        "hidden_size": vision_hidden_size, "intermediate_size": 2 * vision_hidden_size, "out_hidden_size": hidden_size,
        "num_position_embeddings": POSITIONS, "deepstack_visual_indexes": list(range(0, vision_layers, 2))[: layers - 1],
    }  # fmt: skip
    text = _text_config(hidden_size, layers, heads, key_value_heads, context) | {"head_dim": hidden_size // heads}
    text |= _three_axes(hidden_size // heads // 2, 5 / 16, mrope_interleaved=True)
    gray = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Qwen2VLImageProcessor(patch_size=IMAGE_UNIT_3 // 2, **gray, **_limits(min_pixels, max_pixels))
    processor = Qwen3VLProcessor(images, _tokenizer(), Qwen3VLVideoProcessor(), CHAT_TEMPLATE)
    _write_vision_model(folder, seed, Qwen3VLForConditionalGeneration, Qwen3VLConfig, text, tower, processor, tied)


def _write_vision_model(
    folder: Path, seed: int, model_class: Any, config_class: Any, text: dict[str, Any], tower: dict[str, Any], processor: Any,
    tied: bool,
) -> None:
    token = processor.tokenizer.convert_tokens_to_ids
    config = config_class(
        text_config={**text, **_token_config(processor.tokenizer), "tie_word_embeddings": tied},
        vision_config=tower, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=tied,
    )  # fmt: skip
    _write(folder, seed, model_class, config, processor)


def _write_text_model(folder: Path, seed: int, model_class: Any, config_class: Any, text: dict[str, Any], tied: bool) -> None:
    tokenizer = _tokenizer()
    config = config_class(**text, **_token_config(tokenizer), tie_word_embeddings=tied)
    _write(folder, seed, model_class, config, tokenizer)


def _write(folder: Path, seed: int, model_class: Any, config: Any, processor: Any) -> None:
    """Initialize and save the model without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _text_config(hidden_size: int, layers: int, heads: int, key_value_heads: int, context: int) -> dict[str, Any]:
    _check_heads("", hidden_size, heads, 2)
    if heads % key_value_heads:
        raise ConfigError(f"model.options.key_value_heads: {key_value_heads} does not divide heads {heads}; choose a divisor")
    return {
        "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "max_position_embeddings": context,
        "initializer_range": _deviation(hidden_size),
    }  # fmt: skip


def _tower_config(hidden_size: int, layers: int, heads: int, unit: int) -> dict[str, Any]:
    """Settings that the towers share."""
    _check_heads("vision_", hidden_size, heads, 4)
    return {
        "depth": layers, "num_heads": heads, "patch_size": unit // 2, "spatial_merge_size": 2,
        "initializer_range": _deviation(hidden_size),
    }  # fmt: skip


def _limits(least: int, most: int) -> dict[str, Any]:
    """Arguments of an image processor."""
    if least > most:
        raise ConfigError(f"model.options.min_pixels: {least} is more than max_pixels {most}; swap or equal them")
    return {"min_pixels": least, "max_pixels": most}


def _deviation(width: int) -> float:
    """Standard deviation of random weights that keeps activations' scale. The usual 0.02 fits widths of thousands."""
    return width**-0.5


def _check_heads(prefix: str, hidden_size: int, heads: int, even: int) -> None:
    """ConfigError unless `even` divides the head size: rotary positions rotate pairs (pairs on two axes in vision)."""
    if hidden_size % (heads * even):
        raise ConfigError(
            f"model.options.{prefix}hidden_size: {hidden_size} is not a multiple of {even} x {prefix}heads {heads};"
            f" use {max(1, round(hidden_size / (heads * even))) * heads * even}"
        )


def _token_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _three_axes(pairs: int, share: float, **more: Any) -> dict[str, Any]:
    """Rotary positions on three axes: of a head's pairs, this share for height and for width, the others for time. The
    published models' shares are 3/8, and 5/16 in Qwen3-VL."""
    side = int(pairs * share)
    sections = [pairs - 2 * side, side, side]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}}


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over `CORPUS`; every digit and every answer tag is one token."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(WORDS_AS_TOKENS), special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS_AS_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS), chat_template=CHAT_TEMPLATE, model_max_length=1 << 20,
    )  # fmt: skip
