"""Checkpoints of one role alone."""

from __future__ import annotations

from rlcore.distributed.snapshot import Snapshot
from rlcore.model.actor import publish


def save(role, folder):
    folder.mkdir(parents=True, exist_ok=True)
    snapshot = Snapshot(folder)
    role.save(snapshot)
    snapshot.write()


def published(model, family, folder):
    """The Hugging Face folder of a checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    publish(model, family, snapshot := Snapshot(folder))
    snapshot.write()
    return folder / "model"
