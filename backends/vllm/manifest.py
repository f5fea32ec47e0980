"""Weight manifest: the tensors an engine needs, where it keeps them, and the verification of an update."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rlcore.distributed.fingerprint import compare, fingerprint
from rlcore.errors import RunError
from rlcore.types import NamedTensors

from . import experts

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative, for the dense product


@dataclass(frozen=True, eq=False)
class _Product:
    """Probe results of a packed matrix [N, K] whose elements can no longer be read.

    On the CPU vLLM keeps linear layers in oneDNN's own layout and drops the original.
    """

    dense: Tensor  # [N] times a random vector: every element counts, to rounding
    column: Tensor  # [N] times a unit vector: one column, a different one for each version, to the bit

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Product) or self.dense.shape != other.dense.shape:
            return False
        distance, size = (self.dense.float() - other.dense.float()).norm(), self.dense.float().norm()
        return torch.equal(self.column, other.column) and bool(distance <= _TOLERANCE[self.dense.dtype] * size)


@dataclass(frozen=True)
class Slot:
    """Where the engine keeps a tensor: part `index` of the rows of `parameter` of a layer; of experts, as `experts.place`."""

    layer: str
    parameter: str
    index: int


def locate(model: nn.Module, name: str, has: Callable[[str], bool]) -> Slot:
    """Place of a tensor given by its Hugging Face name; `has` says whether a layer exists."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None and hasattr(mapper, "get_rename_mapper"):  # vLLM 0.23 has none: its mapper holds names only
        mapper = mapper.get_rename_mapper()
    mapped = next(iter(mapper.apply_list([name]) if mapper else ()), name)
    if of_expert := experts.place(mapped):
        return Slot(*of_expert)
    layer, _, parameter = mapped.rpartition(".")
    parent, _, leaf = layer.rpartition(".")
    for fused, parts in _fused(model).items():
        if leaf in parts and has(f"{parent}.{fused}"):
            return Slot(f"{parent}.{fused}", parameter, parts.index(leaf))
    return Slot(layer, parameter, 0)


def _fused(model: nn.Module) -> dict[str, list[str]]:
    """Fused layers of the engine -> the layers they are made of. Qwen2-VL leaves it to its text model to say so."""
    from vllm.model_executor.utils import get_packed_modules_mapping

    return {fused: parts for fused, parts in get_packed_modules_mapping(model).items() if len(parts) > 1}


class WeightManifest:
    """The tensors the engine needs, and how each is read back. Names come from the served model itself."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]]) -> None:
        self.model = model
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self._fused = _fused(model)
        self.packed = {name for name, layer in model.named_modules() if _is_packed(layer)}
        self.heads = {name for name, layer in model.named_modules() if _is_head(layer)}
        self.experts = {name: experts.ExpertLayer(layer) for name, layer in experts.layers(model)}
        self.needed = {slot for name, _ in model.named_parameters() for slot in self._slots_of(name)}
        self.tied = self._tied_heads()
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._shapes = {self.slot(name): list(shape) for name, shape in shapes.items()}

    def slot(self, name: str) -> Slot:
        """Place of a tensor given by its Hugging Face name."""
        return locate(self.model, name, self._has)

    def admit(self, name: str, tensor: Tensor) -> Slot:
        """The tensor's place; RunError, before the engine sees it, for an unknown name or wrong shape."""
        slot = self.slot(name)
        if slot not in self.needed and slot.layer not in self.tied:
            raise RunError(f"weight sync: unexpected tensor {name}: the engine has no such weight; is this the served model?")
        shape = self._shapes.get(slot, list(tensor.shape))
        if list(tensor.shape) != shape:
            raise RunError(f"weight sync: {name} was sent as {list(tensor.shape)}, the engine holds {shape}")
        return slot

    def part(self, slot: Slot, tensor: Tensor) -> Tensor:
        """This tensor-parallel rank's shard of the tensor."""
        layer = self.model.get_submodule(slot.layer)
        if slot.layer in self.experts:
            return self.experts[slot.layer].part(slot.parameter, tensor)
        if getattr(layer, "tp_size", 1) == 1:
            return tensor
        sizes = getattr(layer, "output_sizes", None)
        if sizes and slot.index == 0 and len(tensor) == sum(sizes) and len(sizes) > 1:  # fused in the checkpoint already
            return torch.cat([_rows_of(layer, index, one) for index, one in enumerate(tensor.split(sizes))])
        return _rows_of(layer, slot.index, tensor)

    def as_held(self, slot: Slot, tensor: Tensor) -> Tensor:
        """Cast to the dtype it is served in. A CPU with AMX keeps biases of a bfloat16 model in float32."""
        return tensor.to(self._dtypes.get(f"{slot.layer}.{slot.parameter}", self.dtype))

    def title(self, slot: Slot) -> str:
        """The tensor's name in the engine, with the part's name in place of a fused layer's."""
        if slot.layer in self.experts:
            return experts.title(slot.layer, slot.parameter, slot.index)
        parent, _, leaf = slot.layer.rpartition(".")
        parts = self._fused.get(leaf)
        return f"{parent}.{parts[slot.index]}.{slot.parameter}" if parts else f"{slot.layer}.{slot.parameter}"

    def transfer(self, version: int) -> WeightTransfer:
        return WeightTransfer(self, version)

    def product(self, layer: str, version: int) -> _Product:
        """Probe a packed layer: vectors over all its rows."""
        module = self._layer(layer)
        probe = _probe(_width(module), version, self.dtype).to(self.device)
        dense, column = module.quant_method.apply(module, probe, None)
        return _Product(dense, column)

    def heads_fed_by(self, slot: Slot) -> list[str]:
        """Output heads that multiply by this tensor: their own weight, or the embedding they are tied to."""
        return [head for head in self.heads if slot.parameter == "weight" and slot.layer in (head, self.tied.get(head))]

    def packed_bytes(self) -> int:
        """Bytes of the packed layers."""
        layers = (self._layer(name) for name in self.packed)
        return sum(_height(layer) * _width(layer) for layer in layers) * self.dtype.itemsize

    def serve_tied_heads(self) -> None:
        """Give tied heads the embedding's repacked weight: vLLM's reload packs only layers that were sent weights, and a tied
        head is sent none, so on the CPU it would keep multiplying by the old embedding."""
        for head, embedding in self.tied.items():
            owner = self.model.get_submodule(embedding)
            if hasattr(owner, "cpu_linear"):
                self.model.get_submodule(head).cpu_linear = owner.cpu_linear

    def parameter(self, layer: str, name: str) -> Tensor | None:
        return getattr(self.model.get_submodule(layer), name, None) if self._has(layer) else None

    def _layer(self, name: str) -> Any:
        """A layer, typed Any for the attributes that vLLM gives it."""
        return self.model.get_submodule(name)

    def _has(self, layer: str) -> bool:
        try:
            self.model.get_submodule(layer)
        except AttributeError:
            return False
        return True

    def _slots_of(self, name: str) -> list[Slot]:
        layer, _, parameter = name.rpartition(".")
        if layer in self.experts:
            parts = self.experts[layer].tensors(parameter)
        else:
            parts = len(self._fused.get(layer.rpartition(".")[2], [0]))
        return [Slot(layer, parameter, index) for index in range(parts)]

    def _tied_heads(self) -> dict[str, str]:
        """Head layer -> the embedding layer it shares its weight with."""
        owners: dict[int, str] = {}
        for name, layer in self.model.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor) and name not in self.heads:
                owners.setdefault(id(layer.weight), name)
        modules = {name: self.model.get_submodule(name) for name in self.heads}
        return {name: owners[id(layer.weight)] for name, layer in modules.items() if id(layer.weight) in owners}


class WeightTransfer:
    """One weight update: fingerprints what is sent as it streams by, and compares with what the engine holds afterwards."""

    def __init__(self, manifest: WeightManifest, version: int) -> None:
        self._manifest = manifest
        self._version = version
        self._parts: dict[tuple[str, str], dict[int, tuple[str, torch.Size]]] = defaultdict(dict)
        self._sent: dict[str, Any] = {}
        self._experts = experts.SentExperts()
        self._names: dict[Slot, str] = {}
        self.last = ""
        self.tensors = self.bytes = 0
        self.seconds = 0.0

    def watch(self, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            started = time.perf_counter()
            self._note(name, tensor.detach())
            self.seconds += time.perf_counter() - started
            yield name, tensor.detach()

    def verify(self) -> None:
        with torch.inference_mode():
            held = self._held() | self._experts.held()
        compare(self._sent | self._experts.sent, held)

    def _note(self, name: str, tensor: Tensor) -> None:
        manifest, slot = self._manifest, self._manifest.admit(name, tensor)
        self.last = name
        self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
        tensor = manifest.part(slot, tensor).to(manifest.dtype)
        self._names[slot] = name
        if slot.layer in manifest.experts:
            self._experts.add(manifest.experts[slot.layer], slot.parameter, slot.index, name, tensor)
            return
        self._parts[slot.layer, slot.parameter][slot.index] = (name, tensor.shape)
        packed = slot.layer in manifest.packed and slot.parameter == "weight"
        self._sent[name] = _product(tensor, self._version) if packed else fingerprint(manifest.as_held(slot, tensor))
        for head in manifest.heads_fed_by(slot):
            self._sent[_served(head)] = _product(tensor, self._version)

    def _held(self) -> dict[str, Any]:
        """Fingerprints of what the engine holds, by Hugging Face name; by the engine's name where a tensor was not sent."""
        manifest = self._manifest
        missing = [slot for slot in manifest.needed if slot not in self._names]
        incomplete = {(slot.layer, slot.parameter) for slot in missing}
        held: dict[str, Any] = {manifest.title(slot): None for slot in missing}
        for (layer, parameter), parts in self._parts.items():
            if (layer, parameter) in incomplete:
                held |= {name: self._sent[name] for name, _ in parts.values()}  # offsets of the other parts are unknown
            else:
                held |= self._parts_held(layer, parameter, [parts[index] for index in sorted(parts)])
        return held | {_served(head): self._head_held(head) for head in manifest.heads}

    def _parts_held(self, layer: str, parameter: str, parts: list[tuple[str, torch.Size]]) -> dict[str, Any]:
        packed = layer in self._manifest.packed and parameter == "weight"
        whole = self._manifest.product(layer, self._version) if packed else self._manifest.parameter(layer, parameter)
        if whole is None:
            return {}
        held, start = {}, 0
        for name, shape in parts:
            rows = slice(start, start + shape[0])
            start = rows.stop
            product = isinstance(whole, _Product)
            held[name] = _Product(whole.dense[rows], whole.column[rows]) if product else _fingerprint_as(whole[rows], shape)
        return held

    def _head_held(self, head: str) -> _Product:
        product = self._manifest.product(head, self._version)
        sent = self._sent.get(_served(head))
        rows = slice(0, len(sent.dense) if sent else None)  # without the padding of the vocabulary
        return _Product(product.dense[rows], product.column[rows])


def _rows_of(layer: Any, index: int, tensor: Tensor) -> Tensor:
    """This rank's rows of part `index` of a layer (its columns, for a row-parallel layer)."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(layer, VocabParallelEmbedding):
        return tensor[layer.shard_indices.org_vocab_start_index : layer.shard_indices.org_vocab_end_index]
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear) and index > 0:  # with few key-value heads, several ranks hold one
        rank, size = rank // layer.num_kv_head_replicas, size // layer.num_kv_head_replicas
    if isinstance(layer, ColumnParallelLinear):
        return tensor.chunk(size)[rank]
    return tensor.chunk(size, dim=1)[rank] if isinstance(layer, RowParallelLinear) and tensor.dim() > 1 else tensor


def _product(tensor: Tensor, version: int) -> _Product:
    """Expected probe results of a packed layer with the weight [N, K]."""
    column = version % tensor.shape[1]
    return _Product(tensor.mv(_noise(tensor.shape[1]).to(tensor)), tensor[:, column].clone())


def _probe(width: int, version: int, dtype: torch.dtype) -> Tensor:
    """[2, width]: a random row, and the unit vector of the column that this version checks to the bit."""
    probe = torch.zeros(2, width, dtype=dtype)
    probe[0] = _noise(width)
    probe[1, version % width] = 1
    return probe


@lru_cache
def _noise(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


def _fingerprint_as(tensor: Tensor, shape: torch.Size) -> Any:
    """Fingerprint in the shape the tensor was sent in; in its own where that does not fit."""
    return fingerprint(tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor)


def _served(head: str) -> str:
    return f"{head} (as served)"


def _is_packed(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "quant_method") and isinstance(weight, Tensor) and weight.numel() == 0


def _is_head(layer: nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


def _height(layer: Any) -> int:
    """N of a layer [N, K]; ranks share a router's whole."""
    return getattr(layer, "output_size_per_partition", None) or layer.output_size


def _width(layer: Any) -> int:
    """K of a layer [N, K]."""
    return layer.embedding_dim if _is_head(layer) else getattr(layer, "input_size_per_partition", layer.input_size)
