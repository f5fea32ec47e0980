"""Metrics of samples and of weight updates (docs/metrics.md)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rlcore.types import Group, Metrics, Receipt


def throughput(groups: Sequence[Group], timing: Metrics, devices: int) -> Metrics:
    """Tokens per second. `e2e_tps`, `update_tps`, `vllm_tps`: prompt and response tokens of all samples, per device, over
    `timing/all`, `update`, `rollout`. `decode_tps`: response tokens per device over `rollout`. `tps_throughput`: all tokens
    of the whole cluster over `timing/all`."""
    response = sum(len(sample.token_ids) for group in groups for sample in group.samples)
    tokens = response + sum(len(group.prompt.token_ids) * len(group.samples) for group in groups)
    rates = {
        "e2e_tps": tokens / devices / timing["timing/all"],
        "tps_throughput": tokens / timing["timing/all"],
    }
    if "timing/update" in timing:
        rates["update_tps"] = tokens / devices / timing["timing/update"]
    if "timing/rollout" in timing:
        rates["vllm_tps"] = tokens / devices / timing["timing/rollout"]
        rates["decode_tps"] = response / devices / timing["timing/rollout"]
    return rates


def spread(name: str, values: Iterable[float]) -> Metrics:
    """`name/mean`, `name/max`, `name/min`; empty without values."""
    values = list(values)
    if not values:
        return {}
    return {f"{name}/mean": statistics.fmean(values), f"{name}/max": max(values), f"{name}/min": min(values)}


def lengths(groups: Sequence[Group]) -> Metrics:
    """Tokens: `prompt_length/*` over prompts, `response_length/*` over samples, and the share cut off at the limit."""
    samples = [sample for group in groups for sample in group.samples]
    return {
        **spread("response_length", (len(sample.token_ids) for sample in samples)),
        **spread("prompt_length", (len(group.prompt.token_ids) for group in groups)),
        "response_length/clip_ratio": sum(sample.finish == "length" for sample in samples) / len(samples),
    }


def images(groups: Sequence[Group]) -> Metrics:
    """`vision/images_encoded`: images of all prompts, each of which the vision encoder has read once."""
    shown = [group.prompt.vision for group in groups if group.prompt.vision is not None]
    return {"vision/images_encoded": float(sum(len(vision["image_grid_thw"]) for vision in shown))}


def sync(receipt: Receipt) -> Metrics:
    """`sync/{bytes,seconds,check_seconds}` of a weight sync, the last being the part spent on its receipt."""
    return {
        "sync/bytes": float(receipt.bytes), "sync/seconds": receipt.seconds, "sync/check_seconds": receipt.check_seconds,
    }  # fmt: skip
