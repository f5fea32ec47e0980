"""Chat templates: messages to text, and a conversation to the pieces that a model reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlcore.errors import ConfigError, nearest

_GIVEN = {"messages", "add_generation_prompt"}  # variables that are not options


class Piece(NamedTuple):
    """Part of a conversation's text."""

    text: str
    written: bool  # by the assistant; its end of turn follows and is not part of the text


class ChatTemplate:
    """The chat template of a processor. Without one, a text is the messages, one per line."""

    def __init__(self, processor: Any, end: str) -> None:
        """`end`: text of the token that ends a turn."""
        self._processor, self._end = processor, end
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._options: Mapping[str, Any] = {}

    @property
    def is_set(self) -> bool:
        """Whether there is a template, which writes the special tokens itself."""
        return self._processor.chat_template is not None

    def use(self, template: str | None, options: Mapping[str, Any]) -> None:
        """Replace the model's template by a .jinja file or a text, and set variables. ConfigError for a template that does not
        parse, and for a variable that it never reads."""
        if template is not None:
            self._processor.chat_template = self._tokenizer.chat_template = _template_text(template)
        if options:
            self._check_options(options)
        self._options = options

    def render(self, messages: Sequence[Mapping[str, Any]], who: str, generation: bool = True) -> str:
        """Text of the messages, with the generation prompt; ConfigError with the template's own error, naming the row `who`."""
        template = self._processor.chat_template
        if template is None:
            return "\n".join(message["content"] for message in messages)
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generation, **self._options
            )
        except Exception as error:  # a template is a program and may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"{who}: the model's chat template does not take these messages ({roles}): {' '.join(str(error).split())};"
                " change the messages (or data.system), or give another template (data.chat_template)"
            ) from error

    def pieces(self, messages: Sequence[Mapping[str, Any]], who: str) -> Iterator[list[Piece]]:
        """Yield sequences of pieces in which each of the assistant's turns stands once, after the text that the model is given
        when it has to write that turn.

        One sequence, unless the template renders an earlier turn in another way once others follow (Qwen3 drops its
        thoughts): the turns after it are then in a sequence of their own.
        """
        sequence: list[Piece] = []
        read = ""  # the text of the sequence, ends of turns included
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self.render(messages[:place], who)
            if sequence and not given.startswith(read):
                yield sequence
                sequence, read = [], ""
            sequence += [Piece(given[len(read) :], written=False), Piece(message["content"], written=True)]
            read = f"{given}{message['content']}{self._end}"
        yield sequence

    def _check_options(self, options: Mapping[str, Any]) -> None:
        text = self._processor.chat_template
        if text is None:
            raise ConfigError("data.chat_template_options: the model has no chat template; set data.chat_template too")
        known = sorted(_variables(text) - _GIVEN)
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"data.chat_template_options.{name}: the chat template has no such variable{nearest(name, known)}"
                )


def _template_text(template: str) -> str:
    text = template
    if "{" not in template:
        path = Path(template).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.chat_template: {path} cannot be read: {error}; give a .jinja file, or the text") from None
    try:
        _variables(text)
    except TemplateError as error:
        raise ConfigError(f"data.chat_template: not a valid template: {error}") from None
    return text


def _variables(text: str) -> set[str]:
    """Names that a template reads and does not set."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    return meta.find_undeclared_variables(environment.parse(text))
