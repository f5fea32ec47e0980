"""Names of metrics in docs/metrics.md."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def undocumented(names):
    """Those that no table of the page names. There `{a,b}` is either, `<x>` and `*` any text, `@n` and `@k` a number."""
    cells = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    patterns = [pattern for cell in cells for entry in re.findall("`([^`]+)`", cell) for pattern in _patterns(entry)]
    return sorted(name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns))


def _patterns(entry):
    parts = re.split(r"\{([^}]*)\}", entry)
    choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
    for chosen in product(*choices):
        pattern = re.sub(r"<[^>]*>|\*", "\0", "".join(chosen))
        yield re.sub(r"@[nk]", r"@\\d+", re.escape(pattern)).replace("\0", ".+").replace(re.escape("\0"), ".+")
