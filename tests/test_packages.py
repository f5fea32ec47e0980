"""A package imports only packages below it, for type checking too, and there are no import cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rlcore": "rlcore", "rlcore_backends": "backends", "rlcore_adapters": "adapters"}
CORE = (  # bottom up; packages in one line do not import each other
    ["errors", "atomic", "model_files", "tensor_files"], ["types"], ["checks", "config"], ["monitor", "distributed"],
    ["device"], ["protocols"], ["registry"], ["data", "rewards"], ["checkpoint", "algorithms", "weights"], ["model"],
    ["runtime"], ["rollout", "train"], ["diagnose"], ["plan"], ["cli"], ["__main__"],
)  # fmt: skip
BACKENDS = (["common"], ["server"], ["cpu", "cuda", "vllm", "ray"], ["npu", "launch"])
ADAPTERS = (["models", "datasets", "configs", "weights"],)


def module_of(file: Path) -> str:
    """Module name of a file."""
    top = next(name for name, folder in FOLDERS.items() if file.is_relative_to(ROOT / folder))
    parts = [top, *file.relative_to(ROOT / FOLDERS[top]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for folder in FOLDERS.values() for file in sorted((ROOT / folder).rglob("*.py"))}


def imported(module: str) -> Iterator[str]:
    """Modules of this project that a module imports, anywhere in its file."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            names = (f"{origin}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else origin for name in names if name in MODULES or origin in MODULES)


def floors(order: tuple[list[str], ...]) -> dict[str, int]:
    return {name: number for number, names in enumerate(order) for name in names}


@pytest.mark.parametrize("top, order", [("rlcore", CORE), ("rlcore_backends", BACKENDS), ("rlcore_adapters", ADAPTERS)])
def test_a_package_imports_only_packages_below_it(top, order):
    floor = floors(order)
    assert {name.split(".")[1] for name in MODULES if name.startswith(f"{top}.")} == floor.keys()
    wrong = []
    for module in MODULES:
        parts = module.split(".")
        if parts[0] != top or len(parts) == 1:
            continue
        for other in imported(module):
            theirs = other.split(".")
            if theirs[0] == top and len(theirs) > 1 and theirs[1] != parts[1] and floor[theirs[1]] >= floor[parts[1]]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    edges = {module: set(imported(module)) - {module} for module in MODULES}
    while leaves := {module for module, others in edges.items() if not others & edges.keys()}:
        edges = {module: others - leaves for module, others in edges.items() if module not in leaves}
    assert edges == {}, "these import each other"
