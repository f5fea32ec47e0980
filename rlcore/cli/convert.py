"""`rlcore convert`: our words, and those of other systems' converters."""

from __future__ import annotations

import argparse
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlcore import registry
from rlcore.errors import ConfigError, nearest
from rlcore.runtime.signals import Interruption

_OURS = ("to", "input", "output", "base", "dtype")
DTYPES = ("float32", "bfloat16", "float16")
_M_MMAP_THRESHOLD = -3  # in malloc.h


def run_convert(options: argparse.Namespace) -> None:
    _return_freed_tensors()
    with Interruption():
        _convert(options)


def _return_freed_tensors() -> None:
    """Have glibc map every block of 1 MiB or more by itself, which freeing returns to the system. By default it soon takes them
    from its heap, where aligned blocks are seldom reused (glibc bug 14581): memory would grow with every tensor."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)


def _convert(options: argparse.Namespace) -> None:
    source, target, settings = _settings(options)
    for name in ("input", "output"):
        if settings.get(name) is None:
            raise ConfigError(f"--{name}: missing; {'what to convert' if name == 'input' else 'a new folder for the result'}")
    if options.shard_size <= 0:
        raise ConfigError(f"--shard-size: {options.shard_size} is not a size; give gigabytes, such as 5")
    from rlcore.weights.convert import Conversion, convert

    paths = {name: Path(str(settings[name])) for name in ("input", "output", "base") if settings.get(name) is not None}
    reading, writing = (_below(settings, part) for part in ("from", "to"))
    shard_bytes = int(options.shard_size * 10**9)
    asked = Conversion(
        source, target, **paths, dtype=settings.get("dtype"), shard_bytes=shard_bytes, reading=reading, writing=writing
    )
    done = convert(asked)
    print(f"{source} -> {target}: {done.tensors} tensors, {done.nbytes / 1e9:.2f} GB, read back and equal: {asked.output}")
    if done.untied:
        print("warning: the base model's config ties the head to the embedding, the checkpoint has another head: it is kept")


def _settings(options: argparse.Namespace) -> tuple[str, str, dict[str, Any]]:
    """Both formats, and what is asked for by our names."""
    source, *more = [word for word in options.formats if "=" not in word] or [""]
    words = _pairs([word for word in options.formats if "=" in word] + options.words)
    registry.check("weight_formats", source, "FROM")
    host = registry.load("backends", "cpu")  # conversions run on the host; its patches come before torch's libraries
    backend = host(host.Options())
    backend.apply_environment(os.environ)
    backend.prepare()
    given = {name: value for name in ("input", "output", "base", "dtype") if (value := getattr(options, name)) is not None}
    plugin = registry.load("weight_formats", source)
    commands = getattr(plugin, "commands", {})
    if command := commands.get(" ".join(more)):
        return command.source, command.target, {**_translated(words, command.words), **given}
    if len(more) > 1:
        remedy = nearest(" ".join(more), list(commands)) or "; FROM [TO] are one or two formats"
        raise ConfigError(f"{' '.join(more)}: no such command of {source}{remedy}")
    settings = {**_translated(words, plugin.words), **given}
    target = str(more[0] if more else settings.get("to", "huggingface"))
    registry.check("weight_formats", target, "TO")
    return source, target, settings


def _translated(pairs: Iterator[tuple[str, Any]], words: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in pairs:
        ours: Any = words.get(name, name)
        meant: dict[str, Any] = {ours: value} if isinstance(ours, str) else dict(ours(value))
        for key, one in meant.items():
            if key not in _OURS and not key.startswith(("from.", "to.")):
                known = [*_OURS, *words]
                raise ConfigError(f"{name}: no such argument{nearest(name, known)}; options of the formats are from.x=, to.x=")
            settings[key] = one
    return settings


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Names and values of `--name value`, `--name=value`, `--name` alone (true) and `a.b=value`; values are YAML."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--"):
            text = "true" if not rest or rest[0].startswith("--") or "=" in rest[0] else rest.pop(0)
        elif not equals:
            raise ConfigError(f"{word!r}: not understood; FROM and TO come first, then --name value or a.b=value")
        try:
            yield name, yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{name}: {text!r} is not valid YAML") from None


def _below(settings: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key.removeprefix(f"{part}."): value for key, value in settings.items() if key.startswith(f"{part}.")}
