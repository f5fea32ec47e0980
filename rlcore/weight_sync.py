"""Did the weights arrive? Fingerprints of tensors, and what is said when two sides of a weight sync disagree."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rlcore.errors import RunError

Fingerprint = tuple[str, tuple[int, ...], int]  # dtype, shape, hash of every byte

_COLUMNS = 4096  # 64-bit words a hashed row
_ROWS = 32  # rows a block: 1 MiB, so that the shifted copy stays in a processor's cache
_DEVICE_ROWS = 1024  # where no such cache is, but every call costs a launch
_ROW_MULTIPLIER = 0x1E3779B97F4A7C15  # odd, as all multipliers here: no change of one word can vanish modulo 2**64
_NAMED = 3  # tensors an error message names


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Dtype, shape and a 64-bit hash that reads every byte and its place: swapped elements or rows change it.

    The hash is a sum of 64-bit words, each times an odd number that belongs to its place, modulo 2**64. A sum cannot depend on
    how many threads add it up, and it costs about one pass over memory. It guards against accidents, not against an adversary.
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
    """Nothing when both sides agree, else RunError naming the first tensors that are missing, unexpected or different.

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


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int64, with zeros at the end of the last word."""
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
    """[R, C], [C] -> [R]. Only processors have a matrix product of integers."""
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
