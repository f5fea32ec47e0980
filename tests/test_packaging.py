"""The wheel contains exactly the files of the tree, under our four top-level names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlcore import registry

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "rlcore": "rlcore", "backends": "rlcore_backends", "adapters": "rlcore_adapters", "requirements": "rlcore_requirements",
}  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = ("py.typed", "requirements/*.txt", "conformance/*.json", "conformance/*.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Files of a freshly built wheel, built from a copy to keep the tree clean."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    names = listed or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    needed = ("rlcore/", "backends/", "adapters/", "requirements/", "pyproject.toml", "README.md")
    for name in names:
        if (ROOT / name).is_file() and name.startswith(needed):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder / "tree")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel):
    sources = {
        str(Path(package) / path.relative_to(ROOT / folder))
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or any(map(path.match, DATA))
    }
    assert {name for name in wheel if ".dist-info/" not in name} == sources


def test_no_generic_name_reaches_site_packages(wheel):
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == set(PACKAGES.values())


def test_every_entry_point_resolves():
    declared = {group: set(points) for group, points in PROJECT["entry-points"].items() if group.startswith("rlcore.")}
    assert set(declared) == {f"rlcore.{group}" for group in registry.GROUPS}
    for group, names in declared.items():
        installed = {point.name: point for point in entry_points(group=group)}
        assert names <= set(installed), f"{group}: reinstall, {names - set(installed)} is not registered"
        for name in names:
            assert callable(installed[name].load())


@pytest.mark.parametrize("file", ["cpu.txt", "cuda.txt", "npu.txt"])
def test_the_pins_satisfy_what_the_core_asks_for(file):
    """Each of base.txt is pinned in a device's file, once, to a version that base.txt allows."""
    pins = [Requirement(line) for line in requirements(file)]
    versions = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins)
    for requirement in map(Requirement, requirements("base.txt")):
        version = versions.get(requirement.name)
        assert version is not None, f"{file} does not pin {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {file} pins {version}"


def test_pinned_files_pin_every_line():
    for name in ("cpu.txt", "cuda.txt", "npu.txt", "ray.txt", "dev.txt"):
        for requirement in map(Requirement, requirements(name)):
            assert [one.operator for one in requirement.specifier] == ["=="], f"{name}: {requirement}"


@pytest.mark.parametrize("file", ["cpu.txt", "cuda.txt", "npu.txt"])
def test_no_stack_has_the_apex_of_pypi_or_another_version_than_rays(file):
    """ray.txt is installed beside each of them."""
    pins, ray = ({r.name: str(r.specifier) for r in map(Requirement, requirements(name))} for name in (file, "ray.txt"))
    assert "apex" not in pins
    assert {name: pins[name] for name in pins.keys() & ray.keys()} == {name: ray[name] for name in pins.keys() & ray.keys()}


def requirements(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]
