"""The npu backend on the real torch_npu over a stub CANN: calls are real, computed values are meaningless."""

import os
import sys
from pathlib import Path

from rlcore import registry

NPU = registry.load("backends", "npu")
BACKEND = NPU(NPU.Options(deterministic=True, cores=1))
os.environ.update(BACKEND.environment())  # before anything imports torch
NPU_FOLDER = str(Path(__file__).parents[2] / "backends" / "npu")
RAN: set[tuple[str, str]] = set()  # (file, name) of every backend function that has run


def note(frame, event, argument):
    file = frame.f_code.co_filename
    if event == "call" and file.startswith(NPU_FOLDER):
        RAN.add((Path(file).name, frame.f_code.co_name))


sys.setprofile(note)
BACKEND.prepare()
sys.setprofile(None)
