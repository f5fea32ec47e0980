"""Real data beside some checkouts."""

from __future__ import annotations

from pathlib import Path

import pytest


def shared(*parts: str) -> Path:
    """Real data beside some checkouts; skips where there is none."""
    path = Path(__file__).parents[2].joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('..', 'shared', *parts))}, which is not here")
    return path
