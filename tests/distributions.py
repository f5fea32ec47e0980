"""Packages that are only said to be installed."""

from __future__ import annotations

from pathlib import Path


def distribution(folder: Path, name: str, version: str, summary: str = "", **more: str) -> None:
    """What pip leaves of a package, beside its modules; `more` are its other files by stem."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    for file, text in more.items():
        (place / f"{file}.txt").write_text(text)
