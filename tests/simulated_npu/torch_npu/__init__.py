"""A simulated Ascend device for machines without one. With the parent folder on PYTHONPATH, `import torch_npu` gives torch a
device `npu` with real tensors and correct values: their bytes are in host memory, and each operator runs the CPU kernel on
them. Importing affects the whole process and cannot be undone.

Simulated: tensors of two devices do not mix; a view shares its base's storage; random numbers come from the device's own
generator; freed memory is garbage; collectives of the device take its tensors only; operators without a kernel on the device
are refused. Not simulated: the device's rounding, speed and memory, streams and graphs.

    device.py        the module torch.npu: devices, generators, streams
    dispatch.py      dispatch of operators on npu tensors to CPU kernels
    storage.py       storage operations that would call a device's allocator
    collectives.py   hccl, over gloo
    operators.py     torch_npu's own operators
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
