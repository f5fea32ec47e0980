"""Texts as chat messages, with an image part where an image stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.errors import ConfigError

PLACEHOLDER = "<image>"


def chat(text: str, images: int = 0, system: str | None = None, instruction: str = "", where: str = "prompt") -> list[dict]:
    """One user message as chat messages, `<image>` replaced by image parts; see `conversation`."""
    return conversation([{"role": "user", "content": text}], images, system, instruction, where)


def conversation(
    messages: Sequence[Mapping[str, Any]], images: int = 0, system: str | None = None, instruction: str = "",
    where: str = "prompt",
) -> list[dict]:
    """Chat messages with the system text first, the instruction after the last text, and one image part an image.

    Every `<image>` in a text becomes an image part; without any, the images come first in the first user message.
    ConfigError when their number is not `images`. Content without images is plain text.
    """
    parts = [_parts(message, where) for message in messages]
    if instruction:
        parts[-1] = _instruct(parts[-1], instruction)
    if not any(_is_image(part) for content in parts for part in content):
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        parts[first] = [{"type": "image"}] * images + parts[first]
    placeholders = sum(_is_image(part) for content in parts for part in content)
    if placeholders != images:
        raise ConfigError(f"{where}: {placeholders} {PLACEHOLDER} placeholders for {images} images; there must be one an image")
    start = [{"role": "system", "content": system}] if system else []
    return start + [{"role": message["role"], "content": _content(part)} for message, part in zip(messages, parts, strict=True)]


def _parts(message: Any, where: str) -> list[dict[str, str]]:
    """The content of a message as text and image parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{where}: a chat message is an object with role and content, this is {str(message)[:80]!r}")
    content = message.get("content")
    if isinstance(content, str):
        return _split(content)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return [piece for part in content for piece in _split_part(part, where)]
    raise ConfigError(f"{where}: the content of a message is a text or a list of parts, this is {str(content)[:80]!r}")


def _split_part(part: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    if part.get("type") == "image":
        return [{"type": "image"}]
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return _split(part["text"])
    raise ConfigError(f"{where}: a message's part is {{type: text, text: ...}} or {{type: image}}, this is {str(part)[:80]!r}")


def _split(text: str) -> list[dict[str, str]]:
    first, *rest = text.split(PLACEHOLDER)
    parts = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _instruct(parts: list[dict[str, str]], instruction: str) -> list[dict[str, str]]:
    if parts and not _is_image(parts[-1]):
        return [*parts[:-1], {"type": "text", "text": f"{parts[-1]['text']} {instruction}"}]
    return [*parts, {"type": "text", "text": instruction}]


def _content(parts: list[dict[str, str]]) -> Any:
    if any(_is_image(part) for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _is_image(part: Mapping[str, str]) -> bool:
    return part["type"] == "image"
