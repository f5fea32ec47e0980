"""Fake installed packages: metadata only."""

from __future__ import annotations

from pathlib import Path


def distribution(folder: Path, name: str, version: str, summary: str = "", **more: str) -> None:
    """A package's dist-info as pip writes it; `more` are further metadata files by stem."""
    place = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    for file, text in more.items():
        (place / f"{file}.txt").write_text(text)
