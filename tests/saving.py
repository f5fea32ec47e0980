"""Checkpoints of one role alone, and the tensors in a checkpoint as torch's own reader finds them."""

from __future__ import annotations

import warnings

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader

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


def tensors(folder):
    """Every tensor in the folder's files, whole, by name."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in stored.items()}
    with warnings.catch_warnings(action="ignore"):  # that this is one process
        checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found
