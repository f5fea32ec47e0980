"""That the device's own operators are what torch_npu's say, and what the npu backend makes of them. Run by session.py."""

from __future__ import annotations

import pytest


def test_x():
    pass
