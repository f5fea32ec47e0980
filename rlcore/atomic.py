"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write or replace the file; a reader, or a process that starts after this one died, finds the old content or the new."""
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
