"""Convert texts to chat messages, with image parts at `<image>` placeholders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlcore.errors import ConfigError

PLACEHOLDER = "<image>"


Messages = list[dict[str, Any]]
Parts = list[dict[str, Any]]


def chat(text: str, images: int = 0, instruction: str = "", where: str = "prompt") -> Messages:
    """Chat messages of one user text, `<image>` replaced by image parts; see `conversation`."""
    return conversation([{"role": "user", "content": text}], images, instruction, where)


def conversation(messages: Sequence[Any], images: int = 0, instruction: str = "", where: str = "prompt") -> Messages:
    """Build the chat messages of a prompt: instruction after the last text, one image part per image.

    Every `<image>` in a text becomes an image part; without any, the images come first in the first user message.
    ConfigError when their number is not `images`, and for messages that leave the assistant nothing to answer. Where there are
    no images, or the messages have image parts already, `<image>` is text. Content without images is plain text.
    """
    parts = [_parts(message, where) for message in messages]
    if messages and messages[-1]["role"] == "assistant":
        remedy = "end it with the user's, and keep the assistant's answer in a column of its own (target)"
        raise ConfigError(f"{where}: the prompt ends with the assistant's message, which leaves nothing to answer; {remedy}")
    return _built(messages, parts, len(messages), images, instruction, where)


def dialogue(
    messages: Sequence[Any], images: int = 0, instruction: str = "", where: str = "chat"
) -> tuple[Messages, str | None, Messages]:
    """Split a whole chat at the assistant's first turn: the messages before it, its text, and the messages after it. Without
    such a turn: all messages, None and no messages. Images and instruction as in `conversation`.

    ConfigError for a chat that nothing comes before, that an unanswered message ends, or with an empty turn of the assistant.
    """
    parts = [_parts(message, where) for message in messages]
    replies = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    first = replies[0] if replies else len(messages)
    if replies and replies[-1] != len(messages) - 1:
        raise ConfigError(f"{where}: the chat ends with a message that the assistant does not answer; remove it")
    for place in replies:
        if any(map(_is_image, parts[place])) or not "".join(part["text"] for part in parts[place]).strip():
            raise ConfigError(f"{where}: message {place + 1}, the assistant's, must be a text that is not empty")
    built = _built(messages, parts, first, images, instruction, where)
    return built[:first], built[first]["content"] if replies else None, built[first + 1 :]


def inline_images(messages: Sequence[Any]) -> list[Any]:
    """The images inside message parts, in order: the value of `image`, or the address in `image_url`."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return [image for part in parts if _is_image(part) and (image := _inline(part)) is not None]


def _inline(part: Mapping[str, Any]) -> Any:
    image = part.get("image") or part.get("image_url")
    return image.get("url") if isinstance(image, Mapping) and "url" in image else image


def _built(
    messages: Sequence[Any], parts: list[Parts], asked: int, images: int, instruction: str, where: str
) -> Messages:
    """Messages from their parts; the first `asked` are the prompt."""
    _check_prompt(messages[:asked], parts[:asked], images, where)
    if images and not any(_is_image(part) for content in parts for part in content):
        parts = [[piece for part in content for piece in _split(part["text"])] for content in parts]
    if instruction:
        parts[asked - 1] = _instruct(parts[asked - 1], instruction)
    if not any(_is_image(part) for content in parts for part in content):
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        parts[first] = [{"type": "image"}] * images + parts[first]
    placeholders = sum(_is_image(part) for content in parts for part in content)
    if placeholders != images:
        raise ConfigError(f"{where}: {placeholders} {PLACEHOLDER} placeholders for {images} images; there must be one an image")
    return [{"role": message["role"], "content": _content(part)} for message, part in zip(messages, parts, strict=True)]


def check_opening(opening: str, text: str, where: str, what: str) -> None:
    """ConfigError for a response that repeats the end of the chat template's `opening` (a tag or a turn's header): the model
    would learn to write it twice."""
    if twice := _repeated(opening.rstrip(), text.lstrip()):
        raise ConfigError(
            f"{where}: the {what} begins with {twice!r}, with which the chat template's generation prompt ends: it would be"
            " there twice; remove it from the data, or from the chat template in the model's folder"
        )


def _repeated(opening: str, text: str) -> str:
    """Longest prefix of `text` that ends `opening` and is a mark: whole words with three letters in a row and a punctuation
    sign. `<think>` and `Assistant:` are marks; `A`, `12` and `assistant` may be content."""
    for size in range(min(len(opening), len(text)), 0, -1):
        start = text[:size]
        whole = _between_words(opening, len(opening) - size) and _between_words(text, size)
        if opening.endswith(start) and whole and re.search(r"[^\W\d]{3}", start) and re.search(r"[^\w\s]", start):
            return start
    return ""


def _between_words(text: str, place: int) -> bool:
    return not re.match(r"\w\w", text[max(place - 1, 0) : place + 1])


def _check_prompt(messages: Sequence[Any], parts: Sequence[Parts], images: int, where: str) -> None:
    """ConfigError for a prompt without messages, or whose last one is empty."""
    if not messages:
        raise ConfigError(f"{where}: the prompt is a list without messages; fill it or remove the row")
    if not images and not any(_is_image(part) or part["text"].strip() for part in parts[-1]):
        raise ConfigError(f"{where}: the last message of the prompt is empty; fill it or remove the row")


def _parts(message: Any, where: str) -> Parts:
    """A message's content as text and image parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{where}: a chat message is an object with role and content, this is {str(message)[:80]!r}")
    for name in ("tool_calls", "reasoning_content"):
        if message.get(name):
            raise ConfigError(f"{where}: a chat message has {name}, which are not read; write them into its content")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return [_part(part, where) for part in content]
    raise ConfigError(f"{where}: the content of a message is a text or a list of parts, this is {str(content)[:80]!r}")


def _part(part: Mapping[str, Any], where: str) -> dict[str, str]:
    if _is_image(part):
        return {"type": "image"}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
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


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url")
