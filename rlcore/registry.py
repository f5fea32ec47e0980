"""Plugin lookup by entry point. An unknown name lists the installed ones; a plugin that fails to import raises an error."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model

from rlcore.config.loader import validate
from rlcore.config.sections import Strict
from rlcore.errors import PluginError, nearest

GROUPS = (
    "backends", "doctors", "families", "models", "rollout_engines", "placements", "rewards", "datasets", "preparations",
    "layouts", "launchers", "run_files", "weight_formats",
)  # fmt: skip


def names(group: str) -> list[str]:
    """Names of the plugins installed in a group, sorted."""
    return sorted({point.name for point in entry_points(group=f"rlcore.{group}")})


def check(group: str, name: str, key: str) -> None:
    """Raise PluginError, naming the setting `key`, if no plugin of that name is installed. Imports nothing."""
    if name not in (installed := names(group)):
        hint = nearest(name, installed)
        raise PluginError(f"{key}: none of the installed {group.replace('_', ' ')} is called {name!r}{hint}")


def load(group: str, name: str) -> Any:
    """Import and return a plugin."""
    points = [point for point in entry_points(group=f"rlcore.{group}") if point.name == name]
    targets = Counter(point.value for point in points)
    if not targets:
        raise PluginError(f"{group}: nothing is installed under the name {name!r}{nearest(name, names(group))}")
    if len(targets) > 1:
        raise PluginError(f"{group}: {name!r} is claimed by {' and '.join(targets)}; uninstall one")
    try:
        return points[0].load()
    except Exception as error:
        raise PluginError(f"{group}: the plugin {name!r} ({points[0].value}) does not import: {error!r}") from error


def load_dotted(path: str, what: str) -> Any:
    """Import the object at `package.module.attribute`."""
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise PluginError(f"{what}: no module {error.name!r} (from {path!r}); is its folder on PYTHONPATH?") from error
    except AttributeError:
        raise PluginError(f"{what}: {module!r} has no {attribute!r}") from None
    except Exception as error:
        raise PluginError(f"{what}: {path!r} does not import: {error!r}") from error


class _Options(Strict):
    model_config = ConfigDict(arbitrary_types_allowed=True)


def checked_options(
    function: Callable[..., Any], options: Mapping[str, Any], prefix: str, given: int, handed: Collection[str] = ()
) -> dict[str, Any]:
    """Validate options against the function's annotations; a wrong name or value is a ConfigError under `prefix`.

    given: number of leading parameters that are not options; handed: names of others that are not.
    """
    parameters = list(inspect.signature(function).parameters.values())
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p for p in parameters[given:] if p.kind in kinds and p.name not in handed]
    fields: dict[str, Any] = {p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default) for p in taken}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    free = {name: value for name, value in options.items() if takes_any and name not in fields}
    named = {name: value for name, value in options.items() if name not in free}
    checked = validate(create_model("Options", __base__=_Options, **fields), named, prefix)
    return {name: getattr(checked, name) for name in fields} | free
