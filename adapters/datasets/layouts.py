"""Layouts of training files that other toolkits read: ChatLearn's, MindSpeed's and verl's."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlcore.data.chat import PLACEHOLDER
from rlcore.data.images import decode_image
from rlcore.data.prepare.preparation import (
    Example,
    Layout,
    Origin,
    StoredImage,
    image_types,
    with_instruction,
    with_placeholders,
)

GEOMETRY_INSTRUCTION = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. The reasoning"
    " process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in \\boxed{}."
)
BOXED_INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
HASHES_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
_UNANSWERED = ("DigitalLearningGmbH/MATH-lighteval",)  # ChatLearn's extra_info of these is split and index


def _chatlearn(example: Example, origin: Origin) -> Mapping[str, Any]:
    """Text as a prompt of one message; images as data URLs before it, in `messages`."""
    asked, graded = _asked(example, origin), _graded(example, origin)
    if origin.source in _UNANSWERED:
        graded["extra_info"] = {"split": origin.split, "index": origin.index}
    if not example.images:
        return {"data_source": origin.source, "prompt": _user(asked), **graded}
    parts = [{"type": "image_url", "image_url": _jpeg_url(image)} for image in example.images]
    parts.append({"type": "text", "text": asked.replace(PLACEHOLDER, "")})
    return {"data_source": origin.source, "messages": _user(parts), **graded}


def _verl(example: Example, origin: Origin) -> Mapping[str, Any]:
    """A prompt of one message, with `<image>` where each of `images` belongs."""
    asked = _asked(example, origin)
    if not example.images:
        return {"data_source": origin.source, "prompt": _user(asked), **_graded(example, origin)}
    prompt, images = _user(with_placeholders(asked, len(example.images))), list(example.images)
    return {"data_source": origin.source, "prompt": prompt, "images": images, **_graded(example, origin)}


def _asked(example: Example, origin: Origin) -> str:
    return with_instruction(example.prompt or example.question, origin.instruction)


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _graded(example: Example, origin: Origin) -> dict[str, Any]:
    """The columns that come after the prompt in each of these layouts."""
    return {
        "ability": origin.ability,
        "reward_model": {"style": "rule", "ground_truth": example.answer},
        "extra_info": {
            "split": origin.split, "index": origin.index, "answer": example.published, "question": example.question,
        },
    }  # fmt: skip


def _jpeg_url(image: StoredImage) -> str:
    """The image as RGB JPEG of quality 100, in a data URL; transparency on white, as everywhere here."""
    stream = io.BytesIO()
    decode_image(image["bytes"], image["path"] or "image", Path()).save(stream, "JPEG", quality=100)
    return f"data:image;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _chatlearn_types() -> Mapping[str, Any]:
    import pyarrow

    part = pyarrow.struct({"type": pyarrow.string(), "image_url": pyarrow.string(), "text": pyarrow.string()})
    return {"messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.list_(part)}))}


CHATLEARN = Layout(_chatlearn, ".json", types=_chatlearn_types)
VERL = Layout(_verl, ".parquet", types=image_types)  # also MindSpeed's
