"""Names the npu backend uses of torch_npu, and the core of a device module, parsed from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NPU_FILES = sorted(ROOT.glob("backends/npu/*.py"))


@dataclass(frozen=True)
class Use:
    """A name that is read or, with `keywords`, called."""

    name: str
    where: str
    positional: int = 0
    keywords: frozenset[str] | None = None


def of_torch_npu() -> list[Use]:
    """Names under torch_npu and torch.npu used in the npu backend, including programs in strings."""
    uses = [use for file in NPU_FILES for tree in _programs(file) for use in _uses(tree, file.name)]
    return sorted(set(uses), key=lambda use: (use.where, use.name, use.positional))


def of_device_modules() -> set[str]:
    """Attributes of torch.get_device_module(...) that the core uses."""
    names = set()
    for file in ROOT.glob("rlcore/**/*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        modules = {
            target.id
            for node in ast.walk(tree) if isinstance(node, ast.Assign) and _asks_for_module(node.value)
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (_asks_for_module(node.value) or _name(node.value) in modules):
                names.add(node.attr)
    return names


def imports(file: Path, package: str) -> set[tuple[str, str]]:
    """(module, name) of every `from package... import name`."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    modules = [(node.module, node.names) for node in nodes if node.module and node.module.split(".")[0] == package]
    return {(module, one.name) for module, names in modules for one in names}


def attributes(file: Path, owner: str) -> set[str]:
    """Attributes of `owner` that the source reads, as in `self._runner.NAME`."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) == owner}


def _programs(file: Path) -> Iterator[ast.Module]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import torch, torch_npu\n" in node.value:
            yield ast.parse(node.value)


def _uses(tree: ast.Module, where: str) -> Iterator[Use]:
    aliases = {
        target.id: chain
        for node in ast.walk(tree) if isinstance(node, ast.Assign) and (chain := _chain(node.value, {}))
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _chain(node.func, aliases)):
            yield Use(name, where, len(node.args), frozenset(one.arg or "**" for one in node.keywords))
        elif isinstance(node, ast.Attribute) and (name := _chain(node, aliases)):
            yield Use(name, where)


def _chain(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """Dotted name of an expression, as in torch_npu.optim.NpuFusedAdamW."""
    first, _, rest = (ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else "").partition(".")
    name = f"{aliases.get(first, first)}.{rest}" if rest else aliases.get(first, "")
    return name if name.startswith(("torch_npu.", "torch.npu.")) else None


def _asks_for_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.get_device_module"


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None
