"""A simulated Ascend device for machines without one. With the folder above on PYTHONPATH, `import torch_npu` gives torch a
device `npu` whose tensors are real ones of that device, with right numbers: their bytes are in host memory, and each operator
runs the processor's kernel on them. Importing is for the whole process and cannot be undone.

What it is faithful in: tensors of two devices do not mix; a view shares the storage of what it views; random numbers come from
the device's own generator; freed memory is garbage; collectives of the device take its tensors only; operators that the device
has no kernel for are refused. What it says nothing about: the device's rounding, speed and memory, streams and graphs.

    device.py        the module torch.npu: which devices there are, generators, streams
    dispatch.py      how an operator on npu tensors finds its numbers
    storage.py       what torch asks of a storage where it would ask a device's allocator
    collectives.py   hccl, over gloo
    operators.py     what torch_npu adds to torch's operators
"""

from types import SimpleNamespace

import torch

from . import collectives, device, dispatch, operators, storage

__version__ = "simulated"

_C = SimpleNamespace(_distributed_c10d=SimpleNamespace(ProcessGroupHCCL=collectives.ProcessGroupHCCL))

torch.utils.backend_registration._setup_privateuseone_for_python_backend("npu", device)
dispatch.install()
storage.install()
collectives.install()
operators.install()

npu_fusion_attention = torch.ops.npu.npu_fusion_attention  # transformers imports it
npu_rms_norm = torch.ops.npu.npu_rms_norm
npu_rotary_mul = torch.ops.npu.npu_rotary_mul
npu_swiglu = torch.ops.npu.npu_swiglu
