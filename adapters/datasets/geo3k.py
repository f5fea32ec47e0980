"""Geometry3K (Lu et al., arXiv 2105.04165) as published for reinforcement learning: a diagram, a problem, an answer."""

from __future__ import annotations

from pathlib import Path

from rlcore.data.rows import Rows, rows

INSTRUCTION = (
    "First reason about the problem inside <think> </think> tags, then give the final answer inside \\boxed{}."
)


def geo3k(path: Path | None, *, instruction: str = INSTRUCTION) -> Rows:
    """Rows from columns images (a list of {bytes, path}), problem (with `<image>` placeholders), answer."""
    return rows(path, prompt="problem", answer="answer", images="images", instruction=instruction)
