"""Rows of files or generators -> Prompts: read with the place of every mistake, shuffled by epoch, resumed by one integer."""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import json
import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from PIL import Image
from pydantic import ConfigDict, create_model

from rlcore import registry
from rlcore.config import DatasetConfig, Strict, nearest, validate
from rlcore.errors import ConfigError
from rlcore.types import Prompt, Row

if TYPE_CHECKING:
    from rlcore.protocols import Adapter

SUFFIXES = (".jsonl", ".json", ".parquet")
PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Record:
    """One row of a data file, as it stands there."""

    where: str  # `train.jsonl:17` or `train.parquet row 17`, counted from 1, for messages
    id: str  # `train:17`
    folder: Path  # of the file; image paths are relative to it
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """What the column holds; ConfigError with the columns there are when it is missing."""
        if column not in self.values:
            columns = list(self.values)
            hint = nearest(column, columns)
            hint = hint if "did you mean" in hint else ""
            raise ConfigError(f"{self.where}: no column {column!r} among {', '.join(columns) or 'none'}{hint}")
        return self.values[column]

    def text(self, column: str) -> str:
        """A text or number as text; ConfigError when it is missing, empty or neither."""
        value = self.value(column)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            raise ConfigError(f"{self.where}: column {column!r} is empty; fill it or remove the row")
        if not isinstance(value, str | int | float):
            raise ConfigError(f"{self.where}: column {column!r} holds a {type(value).__name__}; it must be a text or a number")
        return str(value)

    def without(self, *columns: str | None) -> dict[str, Any]:
        """The other columns, bytes left out: what a reward may want to see."""
        return {name: value for name, value in self.values.items() if name not in columns and not isinstance(value, bytes)}


@dataclass(frozen=True)
class Pictures(Sequence[Image.Image]):
    """Images made from their sources each time one is looked at, so a data set of pictures need not fit in memory."""

    make: Callable[[Any], Image.Image]  # importable, so that rows can travel between processes
    sources: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.make, self.sources[index])
        return self.make(self.sources[index])


def read_records(path: str | Path | None) -> Iterator[Record]:
    """The rows of a .jsonl, .json (lines or one list) or .parquet file, or of a folder of files of one of these kinds.

    ConfigError for a missing or unreadable file, an unknown suffix, a broken line (with its number), and no rows at all.
    """
    count = 0
    for file in _files(path):
        for record in _READERS[file.suffix](file):
            count += 1
            yield record
    if not count:
        raise ConfigError(f"{path}: holds no rows")


def decode_image(value: Any, where: str, folder: Path) -> Image.Image:
    """An RGB image, transparency on white, from any of the forms data sets use; ConfigError naming `where` when broken.

    A form is a PIL image, bytes, {"bytes", "path"} as in Hugging Face parquet files, a path relative to `folder`, base64,
    or a `data:image/...;base64,` URL. Orientation tags are not applied.
    """
    image = _open_image(value, where, folder)
    try:
        if image.mode == "RGB":
            image.load()
            return image
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # decoders raise whatever they like on broken bytes
        raise ConfigError(f"{where}: the image cannot be decoded: {error}") from error


def pictures(values: Any, where: str, folder: Path) -> Sequence[Image.Image]:
    """The images of a column, one value or a list. Headers are read now, so a wrong file is named; pixels when looked at."""
    if values is None:
        return ()
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    for value in values:
        _open_image(value, where, folder)
    return Pictures(_decode, tuple((value, where, folder) for value in values)) if values else ()


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


def rows(
    path: str | Path | None, *, prompt: str = "prompt", answer: str | None = "answer", target: str | None = None,
    images: str | None = None, id: str | None = None, system: str | None = None, instruction: str = "",
) -> list[Row]:
    """Rows of a file by column names; `system` and `instruction` are texts. Other columns go to the reward as fields.

    The prompt column holds a text or a list of chat messages. answer=None is for data without answers.
    """
    return [_row(record, prompt, answer, target, images, id, system, instruction) for record in read_records(path)]


def load_rows(config: DatasetConfig, key: str = "data.train") -> list[Row]:
    """The rows a run file asks for. `key` is the section, for messages; ids are unique and there is at least one row."""
    function = registry.load_dotted(config.name, key) if "." in config.name else registry.load("datasets", config.name)
    options = checked_options(function, config.options, f"{key}.options.", given=1)
    found = list(function(None if config.path is None else Path(config.path), **options))[: config.max_rows]
    if not found:
        raise ConfigError(f"{key}: {config.name!r} holds no rows")
    name, count = Counter(row.id for row in found).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"{key}: {count} rows have the id {name!r}; ids must be unique")
    return found


class _Options(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)


def checked_options(function: Callable[..., Any], options: Mapping[str, Any], prefix: str, given: int) -> dict[str, Any]:
    """The options as the function's annotations want them; a wrong name or value is a ConfigError under `prefix`.

    given: how many leading parameters are not options.
    """
    parameters = list(inspect.signature(function).parameters.values())
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    named = [p for p in parameters[given:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in named}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {name: value for name, value in options.items() if name in fields or not takes_any}
    checked = validate(create_model("Options", __base__=_Options, **fields), known, prefix)
    return {name: getattr(checked, name) if name in known else value for name, value in options.items()}


def fitting(
    rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> list[Row]:
    """The rows of at most `max_prompt_tokens` tokens; ConfigError when one must be refused or none is left."""
    lengths = [adapter.prompt_length(row) for row in rows]
    long = [(row, length) for row, length in zip(rows, lengths, strict=True) if length > max_prompt_tokens]
    if long and long_prompts == "refuse":
        row, length = long[0]
        raise ConfigError(
            f"{row.id}: {length} prompt tokens, the limit data.max_prompt_tokens is {max_prompt_tokens} ({len(long)} of"
            f" {len(rows)} rows are too long); raise it to {max(lengths)} or set data.long_prompts to drop"
        )
    if len(long) == len(rows):
        raise ConfigError(
            f"all {len(rows)} prompts are longer than data.max_prompt_tokens {max_prompt_tokens}; the shortest has"
            f" {min(lengths, default=0)} tokens, so raise it to at least that"
        )
    return [row for row, length in zip(rows, lengths, strict=True) if length <= max_prompt_tokens]


class Prompts(Sequence[Prompt]):
    """Rows as one model reads them, in order, encoded when looked at; the latest `cache_bytes` of them are kept."""

    def __init__(self, rows: Sequence[Row], adapter: Adapter, cache_bytes: int = 256 * 2**20) -> None:
        self.rows = rows
        self._adapter = adapter
        self._cache: OrderedDict[int, Prompt] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._held = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        prompt = self._cache.pop(index, None)
        if prompt is None:
            prompt = self._adapter.encode(self.rows[index])
            self._held += _size(prompt)
        self._cache[index] = prompt
        while self._held > self._cache_bytes:
            self._held -= _size(self._cache.popitem(last=False)[1])
        return prompt


def encode_all(
    rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int, long_prompts: Literal["drop", "refuse"] = "drop"
) -> Prompts:
    """Each row that fits, once, in order; for evaluation. What was dropped is len(rows) - len(result)."""
    return Prompts(fitting(rows, adapter, max_prompt_tokens, long_prompts), adapter)


class PromptSource:
    """An endless stream of prompts, shuffled anew each epoch. `drawn`, prompts given out so far, is its whole state."""

    def __init__(
        self, rows: Sequence[Row], adapter: Adapter, max_prompt_tokens: int,
        long_prompts: Literal["drop", "refuse"] = "drop", seed: int = 0,
    ) -> None:
        self.rows = fitting(rows, adapter, max_prompt_tokens, long_prompts)
        self.dropped_long = len(rows) - len(self.rows)
        self.drawn = 0
        self._prompts = Prompts(self.rows, adapter)
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def draw(self, count: int) -> list[Prompt]:
        """The next prompts; they go on into the next epoch where this one ends."""
        places = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [self._prompts[self._row_at(place)] for place in places]

    def _row_at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.rows))
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self._seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]


def _files(path: str | Path | None) -> list[Path]:
    if path is None:
        raise ConfigError(f"this data set is read from files; set its path to a {', '.join(SUFFIXES)} file or a folder of them")
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: no such data file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1:
            found = " and ".join(kinds) or "no data files"
            raise ConfigError(f"{path}: a data folder holds files of one kind of {', '.join(SUFFIXES)}, this has {found}")
    elif path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: unknown suffix {path.suffix!r}; a data file is {', '.join(SUFFIXES)}")
    return files


def _read_json(file: Path) -> Iterator[Record]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            if file.suffix == ".json" and lines.read(64).lstrip().startswith("["):
                lines.seek(0)
                yield from _read_list(file, lines.read())
                return
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file.name}:{number}"
                    yield _record(where, file, number, _parse(line, where))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def _read_list(file: Path, text: str) -> Iterator[Record]:
    for number, values in enumerate(_parse(text, file.name), start=1):
        yield _record(f"{file.name} row {number}", file, number, values)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None


def _read_parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for values in batch.to_pylist():
                number += 1
                yield _record(f"{file.name} row {number}", file, number, values)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: not a readable parquet file: {error}") from None


def _record(where: str, file: Path, number: int, values: Any) -> Record:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: a row is an object with columns, this is a {type(values).__name__}")
    return Record(where, f"{file.stem}:{number}", file.parent, values)


_READERS = {".jsonl": _read_json, ".json": _read_json, ".parquet": _read_parquet}


def _row(
    record: Record, prompt: str, answer: str | None, target: str | None, images: str | None, id: str | None,
    system: str | None, instruction: str,
) -> Row:
    shown = pictures(record.value(images), record.where, record.folder) if images else ()
    asked = record.value(prompt)
    messages = asked if isinstance(asked, list) and asked else [{"role": "user", "content": record.text(prompt)}]
    return Row(
        id=record.text(id) if id else record.id,
        messages=conversation(messages, len(shown), system, instruction, record.where),
        answer=record.text(answer) if answer else "",
        target=record.text(target) if target else None,
        images=shown,
        fields=record.without(prompt, answer, target, images, id),
    )


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


def _decode(source: tuple[Any, str, Path]) -> Image.Image:
    return decode_image(*source)


def _open_image(value: Any, where: str, folder: Path) -> Image.Image:
    """The image with its header read and its pixels not yet."""
    if isinstance(value, Image.Image):
        return value
    try:
        return Image.open(io.BytesIO(_image_bytes(value, where, folder)))
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: no image file {error.filename}") from None
    except Exception as error:
        raise ConfigError(f"{where}: the image cannot be opened: {error}") from error


def _image_bytes(value: Any, where: str, folder: Path) -> bytes:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: an image is bytes, a path, base64 or {{bytes, path}}, this is a {type(value).__name__}")
    if value.startswith("data:"):
        return _base64(value.partition(",")[2], where, "the data URL")
    if len(value) < 4096 and (Path(value).suffix or (folder / value).is_file()):
        return (folder / value).read_bytes()
    return _base64(value, where, f"{value[:40]!r} is no file in {folder}, and")


def _base64(text: str, where: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        raise ConfigError(f"{where}: {what} does not hold valid base64") from None


def _size(prompt: Prompt) -> int:
    """Bytes, roughly: 32 a token of the two lists, and the tensors."""
    tensors = [*(prompt.vision or {}).values(), *([] if prompt.position_ids is None else [prompt.position_ids])]
    return 32 * (len(prompt.token_ids) + len(prompt.engine_token_ids)) + sum(tensor.nbytes for tensor in tensors)
