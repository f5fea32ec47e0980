"""Checkpoints of one role alone."""

from __future__ import annotations

from rlcore.checkpoint.snapshot import Snapshot


def save(role, folder):
    snapshot = Snapshot(folder)
    role.save(snapshot)
    snapshot.write()
