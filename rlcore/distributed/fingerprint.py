"""Tensor fingerprints: verify that weights arrived and that everything else is unchanged, and report mismatches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlcore.errors import RunError

Fingerprint = tuple[str, tuple[int, ...], int]  # dtype, shape, hash of every byte

_COLUMNS = 4096  # 64-bit words per hashed row
_ROWS = 32  # rows per block: 1 MiB, so that the shifted copy stays in the CPU cache
_DEVICE_ROWS = 1024  # on accelerators: no such cache, but every call costs a kernel launch
_ROW_MULTIPLIER = 0x1E3779B97F4A7C15  # odd, as all multipliers here: no change of one word can vanish modulo 2**64
_NAMED = 3  # tensors an error message names
_DEPTH = 4  # nesting levels of containers and objects searched below a layer's attribute
_REGISTERED = frozenset(vars(nn.Module()))  # attributes that torch itself gives a module: its parameters, buffers, hooks


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Dtype, shape and a 64-bit hash of every byte and its position: swapped elements or rows change it.

    The hash is the sum of 64-bit words, each times an odd multiplier of its position, modulo 2**64. A sum does not depend on
    the number of threads, and it costs about one pass over memory. It guards against accidents, not against an adversary.
    """
    words = _words(tensor.detach())
    whole = words.numel() // _COLUMNS * _COLUMNS
    rows = [_hash_rows(words[:whole].view(-1, _COLUMNS))] if whole else []
    if whole < words.numel():
        rows.append(_hash_rows(words[whole:].unsqueeze(0)))
    hashes = torch.cat(rows) if rows else words
    places = torch.arange(hashes.numel(), device=words.device) * 2 + 1
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), int((hashes * (places * _ROW_MULTIPLIER)).sum())


def compare(
    sent: Mapping[str, Any],
    held: Mapping[str, Any],
    tied: Mapping[str, str] | None = None,
    same: Callable[[Any, Any], bool] = operator.eq,
) -> None:
    """Check that both sides agree; RunError names the first tensors that are missing, unexpected or different.

    `tied` maps a name to the one it shares storage with (lm_head.weight to the embedding); a side that leaves the name out is
    taken to mean its partner. `same` compares two fingerprints, for holders that can only prove equality by other means.
    """
    sent, held = _with_tied(sent, tied or {}), _with_tied(held, tied or {})
    faults = {
        "missing (the engine needs them, nobody sent them)": [name for name in held if name not in sent],
        "unexpected (sent, but not in the engine)": [name for name in sent if name not in held],
        "different": [name for name in sent if name in held and not same(sent[name], held[name])],
    }
    if any(faults.values()):
        raise RunError(
            "weight sync: the engine does not hold what the actor sent: "
            + "; ".join(f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names)
            + "; samples drawn from it would not be the policy's, so the run stops here"
        )


class Constants:
    """A model's tensors besides its weights: no update sends them, so neither an update nor a sleep may change them.

    Buffers must equal those of the loaded model. Tensors that a layer holds unregistered (in attributes, and in containers and
    plain objects there) may be scratch of sampling: they must equal those before the update or sleep, and over an update only
    where the layer does not derive them from its weights. A tensor that shares memory with a weight must keep doing so. All of
    these have been lost silently. vLLM's reload overwrote a buffer that no checkpoint has (vLLM #44371, KL to the trainer
    0.008 -> 1.52) and one that shares memory (vLLM #42481); a sleep that discards weights discarded more than was restored
    (NeMo-RL #2631; attributes in vllm-ascend #13012, tensors of plain objects in #13352).
    """

    def __init__(
        self, model: nn.Module, varying: Iterable[Tensor] = (), derives: Callable[[Any], bool] | None = None
    ) -> None:  # fmt: skip
        """`varying`: tensors that sampling writes. `derives`: whether a layer, or an object that one holds, may derive tensors
        from weights; by default a layer with parameters of its own."""
        self._model, self._derives = model, derives or holds_weights
        storages = {_storage(tensor) for tensor in varying}
        everything = list(self._held())
        first = {id(one.tensor): (name, one) for name, one in reversed(everything)}  # a tensor's first name
        held = {name: one for name, one in reversed(first.values()) if _storage(one.tensor) not in storages}
        made = {id(one.tensor) for _, one in everything if one.derived}
        self._attributes = {name for name, one in held.items() if not one.registered}
        self._derived = {name for name in self._attributes if id(held[name].tensor) in made}
        self._loaded = self._read(held.keys() - self._attributes)
        self._noted: dict[str, Any] | None = None

    def note(self) -> None:
        """Record unregistered tensors before an update or a sleep. A record that no check has cleared is kept."""
        if self._noted is None:
            self._noted = self._read(self._attributes)

    def check(self, event: str, remedy: str, updated: bool = False, given_up: bool = False) -> None:
        """RunError names the tensors that changed or are gone. In an update (`updated`) layers may have derived tensors anew;
        when a sleep has discarded all weights (`given_up`), only buffers can exist before the next update."""
        before = dict(self._loaded)
        if self._noted and not given_up:
            before |= {name: reading for name, reading in self._noted.items() if not (updated and name in self._derived)}
        now = self._read(before.keys())
        faults = {
            "gone": [name for name in before if name not in now],
            "different": [name for name in before if name in now and now[name] != before[name]],
        }
        if any(faults.values()):
            raise RunError(
                f"weight sync: {event} left the engine without tensors that it was loaded with and that no update sends: "
                + "; ".join(f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names)
                + f"; samples drawn from it would not be the policy's, so the run stops here; {remedy}"
            )
        if not given_up:
            self._noted = None

    def _held(self) -> Iterator[tuple[str, _Held]]:
        for name, buffer in self._model.named_buffers():
            yield name, _Held(buffer, registered=True)
        yield from _attributes(self._model, self._derives)

    def _read(self, names: Collection[str]) -> dict[str, Any]:
        owners = {_storage(weight): name for name, weight in self._model.named_parameters() if weight.numel()}
        with torch.inference_mode():
            return {name: _reading(one.tensor, owners) for name, one in self._held() if name in names}


def holds_weights(holder: Any) -> bool:
    return isinstance(holder, nn.Module) and next(holder.parameters(recurse=False), None) is not None


class _Held(NamedTuple):
    """A tensor of a model that is not a parameter."""

    tensor: Tensor
    registered: bool = False
    derived: bool = False  # may be derived from weights


def _attributes(model: nn.Module, derives: Callable[[Any], bool]) -> Iterator[tuple[str, _Held]]:
    memory: dict[tuple[int, int], list[tuple[str, _Held]]] = {}
    for layer, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _REGISTERED:
                for path, held in _below(value, derives, _DEPTH, memory):
                    name = f"{layer}.{key}{path}".removeprefix(".")
                    yield name, held._replace(derived=held.derived or derives(module))


def _below(
    value: Any, derives: Callable[[Any], bool], depth: int, memory: dict[tuple[int, int], list[tuple[str, _Held]]]
) -> list[tuple[str, _Held]]:
    """The tensors inside a value, each with its path. Nested layers are skipped: `_attributes` visits every layer."""
    if isinstance(value, Tensor):
        return [("", _Held(value))]
    parts = _parts(value) if depth else ()
    if not parts:
        return []
    if (id(value), depth) not in memory:
        memory[id(value), depth] = []  # ends cycles while its parts are searched
        made = derives(value)
        memory[id(value), depth] = [
            (key + path, held._replace(derived=held.derived or made))
            for key, one in parts for path, held in _below(one, derives, depth - 1, memory)
        ]  # fmt: skip
    return memory[id(value), depth]


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", one) for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{place}]", one) for place, one in enumerate(value)]
    if isinstance(value, nn.Module | ModuleType | type) or not hasattr(value, "__dict__"):
        return []
    return [(f".{key}", one) for key, one in vars(value).items()]


def _reading(tensor: Tensor, owners: Mapping[int, str]) -> Any:
    """The value that must not change: the fingerprint, or for a view of a weight, which part of which weight."""
    if tensor.is_meta:
        return "meta", tensor.dtype, tensor.shape
    if owner := owners.get(_storage(tensor)):
        return owner, tensor.storage_offset(), tensor.shape, tensor.stride()
    return fingerprint(tensor)


def _storage(tensor: Tensor) -> int:
    """Identity of a tensor's storage, shared by its views; valid while the memory is offloaded too."""
    return tensor.untyped_storage()._cdata


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int64, the last word padded with zeros."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8))
    return raw.view(torch.int64)


def _hash_rows(rows: Tensor) -> Tensor:
    """[R, C] int64 -> [R]: the weighted sum of each row.

    A flipped highest bit moves such a sum by 2**63 whatever the multiplier, so two would cancel: upper halves are summed again.
    """
    weights, upper_weights = _multipliers(rows.device)[:, : rows.shape[1]]
    blocks = rows.split(_ROWS if rows.device.type == "cpu" else _DEVICE_ROWS)
    return torch.cat([_weighted(block, weights) + _weighted(block >> 32, upper_weights) for block in blocks])


def _weighted(block: Tensor, weights: Tensor) -> Tensor:
    """[R, C], [C] -> [R]. Only CPUs have an integer matrix product."""
    return block.mv(weights) if block.device.type == "cpu" else (block * weights).sum(1)


@lru_cache
def _multipliers(device: torch.device) -> Tensor:
    """[2, _COLUMNS] odd int64, always the same."""
    generator = torch.Generator().manual_seed(0x726C)
    return (torch.randint(-(2**62), 2**62, (2, _COLUMNS), generator=generator) * 2 + 1).to(device)


def _with_tied(side: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    return {**{name: side[partner] for name, partner in tied.items() if partner in side}, **side}


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
