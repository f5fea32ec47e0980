"""vLLM's general plugin, which every process of a vLLM server loads: prepares the device and registers our weight transfer."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlcore import registry
from rlcore.config.loader import validate

from .internals import register_class

TRANSFER = "rlcore"  # of `vllm serve --weight-transfer-config '{"backend": "rlcore"}'`
SERVED_BY = "RLCORE_SERVER"  # JSON {"backend", "options", "model"}: what the processes of a server prepare for


def register() -> None:
    """Called by vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER, "rlcore_backends.vllm.transfer", "Transfer")
    prepare()


def prepare() -> None:
    """Prepare the device, and register the model's class, in a process of a server of ours. An engine in a worker's process has
    the worker's device."""
    if served := os.environ.get(SERVED_BY):
        chosen = json.loads(served)
        kind = registry.load("backends", chosen["backend"])
        kind(validate(kind.Options, chosen["options"], "backend.options.")).prepare()
        register_class(Path(chosen["model"]))
