"""Read a run file: YAML, overrides, validation, and one line per mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from rlcore.config.schema import RunConfig
from rlcore.config.sections import Strict
from rlcore.errors import ConfigError, nearest


class _KeyTwice(Exception):
    """`LINE: 'key' is already set on line LINE`."""


class EachKeyOnce(yaml.SafeLoader):
    """Rejects duplicate keys, of which SafeLoader would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise _KeyTwice(f"{line}: {key.value!r} is already set on line {lines[key.value]}; remove one")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run file with `a.b=value` overrides (values are YAML); ConfigError says which key is wrong and why."""
    return validate(RunConfig, read(path, overrides))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the file, over the run file that it names as its `base`, and apply the overrides, without validation."""
    values = _based(Path(path), ())
    for override in overrides:
        values = overridden(values, override)
    return values


def _based(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file merged into those of its base; `above`: the files that it is the base of."""
    values = read_mapping(path)
    if (base := values.pop("base", None)) is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of a run file, from this one's folder; it is {_kind(base)}")
    above = (*above, path.resolve())
    if (path.parent / base).resolve() in above:
        raise ConfigError(f"{path}: base: {base} has this file as its base; remove one")
    return _merged(_based(path.parent / base, above), values)


def _merged(below: Any, values: Any) -> Any:
    """Sections are merged; any other value replaces the one below, and an empty one removes it."""
    if not (isinstance(below, dict) and isinstance(values, dict)):
        return values
    kept = {key: value for key, value in below.items() if key not in values}
    return kept | {key: _merged(below.get(key), value) for key, value in values.items() if value is not None}


def read_mapping(path: Path, yaml_loader: type[EachKeyOnce] = EachKeyOnce) -> dict[str, Any]:
    """Read the file's settings; ConfigError for a file that is not there, is no YAML or holds anything else."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml_loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such run file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except _KeyTwice as twice:
        raise ConfigError(f"{path}:{twice}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = _kind(values)
        raise ConfigError(f"{path}: a run file is a mapping of settings (model:, data:, reward:, ...), this holds {found}")
    return values


def validate(schema: type[Strict] | type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> Any:
    """Validate `values` as `schema`; one ConfigError has a line for each wrong key, each with its full name."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(schema, prefix, detail, values) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def dump(config: RunConfig) -> str:
    """Dump every setting as YAML, in the order of the schema; reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def overridden(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `values` under `a.b=value`; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w/-]+(\.[\w/-]+)*", key):
        raise ConfigError(f"{override!r}: an override is a.b=value, for example train.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not valid YAML") from None
    return _with(values, key.split("."), value, key)


def _with(values: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """Copy `values` with the entry at `path` replaced; list entries are named by their index."""
    head, *rest = path
    if isinstance(values, list):
        if not head.isdigit() or int(head) >= len(values):
            raise ConfigError(f"{key}: {head!r} is not an entry of this list of {len(values)}")
        index = int(head)
        return [*values[:index], _with(values[index], rest, value, key) if rest else value, *values[index + 1 :]]
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{key}: {head!r} stands below a plain value ({values!r}), not below a section")
    return {**values, head: _with(values.get(head), rest, value, key) if rest else value}


def _explain(schema: type[BaseModel], prefix: str, detail: Any, values: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = prefix + ".".join(_written(location, values))
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{key}: no such setting{nearest(location[-1], fields_of(schema, location[:-1]))}"
    if kind == "missing":
        return f"{key}: must be set"
    if kind == "value_error":
        message = str(detail["ctx"]["error"])
        return f"{key}.{message}" if key else message
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}; it is {_kind(given)}"


def _written(location: Sequence[str], values: Any) -> Iterator[str]:
    """The parts of a location that the run file has: a list or table that was made of a single entry is not one there."""
    for place, part in enumerate(location):
        there = values[int(part)] if isinstance(values, list) and part.isdigit() else None
        there = values.get(part) if isinstance(values, Mapping) else there
        if there is None and place < len(location) - 1 and isinstance(values, Mapping | list):
            continue
        yield part
        values = there


def fields_of(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The settings of the section at `path`."""
    for name in path:
        if name in schema.model_fields:  # else an entry of a list or table
            schema = next(_sections(schema.model_fields[name].annotation))
    return list(schema.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that occur in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _sections(part)


def _kind(value: Any) -> str:
    if value is None:
        return "empty"
    return f"{value!r}" if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
