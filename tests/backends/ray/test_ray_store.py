"""Data between controller and workers: values unchanged, each array sent once, every byte counted."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rlcore_backends.ray import store as ray_store
from rlcore_backends.ray.store import Outbox, RayStore, handles, packed, unpacked, values
from run_files import first_prompts

from rlcore import registry
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.model.resolved import ResolvedModel
from rlcore.runtime.placement import local
from rlcore.runtime.pool import Store
from rlcore.runtime.watchdog import Watchdog
from rlcore.types import Batch, Group, Prompt, Row, Sample, Sampling

TENSORS = {
    "float32": torch.randn(3, 5), "bfloat16": torch.randn(7).bfloat16(), "bool": torch.tensor([True, False]),
    "one number": torch.tensor(3.5), "empty": torch.empty(0, 4), "a column": torch.arange(12).view(3, 4)[:, 1],
    "large": torch.randn(300, 300), "with gradient": torch.ones(2, requires_grad=True),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_arrive_as_they_were_and_in_memory_of_their_own(name):
    sent = TENSORS[name]
    parcel = packed(sent)
    shared = replace(parcel, buffers=[bytes(buffer) for buffer in parcel.buffers])  # read-only, as shared memory is
    for arrived in (unpacked(parcel, handles), unpacked(shared, values)):
        assert arrived.dtype == sent.dtype and torch.equal(arrived, sent) and arrived.requires_grad == sent.requires_grad
    before = unpacked(shared, values)
    with torch.no_grad():
        before.zero_()
    assert torch.equal(unpacked(shared, values), sent)


def test_a_part_of_a_tensor_travels_without_the_rest_and_is_counted():
    whole = torch.randn(1000, 1000)
    assert 4000 < packed(whole[:1]).bytes < 4500
    assert 4_000_000 < packed({"here": whole, "again": whole}).bytes < 4_001_000, "twice in a parcel is once"
    assert len(packed(whole).pickled) < 1000, "large ones are not copied into the pickle"


def a_group(name="a"):
    prompt = Prompt(Row(name, [{"role": "user", "content": "x" * 9000}], images=["pixels" * 2000]), [1, 2], [1, 2])
    return Group(prompt, [Sample(np.arange(5), -np.ones(5), "y" * 9000, "stop", 3)])


def test_a_group_is_sent_once_for_as_long_as_it_is_held_and_without_what_models_do_not_read(cluster):
    store, group = RayStore(), a_group()
    first = store.group(group)
    assert 0 < store.bytes() < 3000
    assert store.group(group) is first and store.bytes() == 0
    (seen,) = unpacked(packed([first]), values)
    assert seen.prompt.row.id == "a" and seen.prompt.token_ids == [1, 2]
    (sample,) = seen.samples
    assert sample.token_ids.tolist() == [0, 1, 2, 3, 4] and sample.logprobs.tolist() == [-1] * 5 and sample.policy_version == 3
    del group, seen, sample
    gc.collect()
    assert len(store._groups) == 0
    store.group(a_group())
    assert store.bytes() > 0


def test_what_a_worker_keeps_back_is_named_to_the_controller_and_seen_by_other_workers(cluster):
    """Its bytes are counted with the answer."""
    worker, controller = Outbox(), RayStore()
    embeds = torch.randn(500, 100)
    answer = worker.answer({"image_embeds": worker.put(embeds)})
    assert len(answer.pickled) < 1000 and not answer.buffers
    named = controller.received(answer)
    assert isinstance(named["image_embeds"], ray_store.Handle)
    assert 200_000 < controller.bytes() < 202_000
    group = replace(a_group(), prompt=replace(a_group().prompt, vision=named))
    sent = controller.sent([controller.group(group), named, named])
    assert controller.bytes() < 6000
    first, *others = unpacked(sent, values)
    assert all(torch.equal(vision["image_embeds"], embeds) for vision in (first.prompt.vision, *others))
    assert worker.answer(1).bytes < 100, "counted once"


PLACED = {
    "together": {"devices": 2},
    "sharing rows": {"devices": 2},
    "apart": {"pools": {"train": {"roles": ["actor"]}, "sample": {"roles": ["rollout"]}, "fixed": {"roles": ["reference"]},
                        "see": {"roles": ["vision"], "devices": 2}}},
}  # fmt: skip
TOKENS, WIDTH = 64, 512  # tokens per image, embedding size


def resolved_of(models, backend, **settings):
    folder = models / "vision_wide"
    if not folder.exists():
        registry.load("models", "tiny_qwen2_5_vl")(folder, layers=1, vision_layers=2, hidden_size=WIDTH)
    figures = {"name": "geometry_figures", "options": {"count": 4, "kinds": ["dots"], "largest": 5, "size": 448}}
    return ResolvedModel(validate(RunConfig, {
        "model": {"path": str(folder), "freeze": ["vision"], "precision": "fp32"}, "backend": {"options": {"threads": 1}},
        "data": {"train": figures, "max_prompt_tokens": 400}, "rollout": {"engine": "torch", "max_new_tokens": 4},
        "algorithm": {"kl_coef": 0.1}, "train": {"max_tokens_per_microbatch": 420}, **settings,
    }), backend)  # fmt: skip


def step(placement, prompts):
    """Bytes sent and results, for each whole-batch call of a step."""

    def measured(value):
        numbers = value.tolist() if isinstance(value, torch.Tensor) else value
        return placement.traffic()["placement/bytes"], numbers

    drawn = dict(placement.rollout.stream(prompts, Sampling(3, 4, seed=5)))
    batch = Batch.of([drawn[place] for place in range(len(prompts))])
    sampled = measured(batch.rollout_logprobs)
    reference = measured(placement.reference.logprobs(batch))
    old = measured(placement.actor.logprobs(batch))
    compared = {"ref_logprobs": torch.tensor(reference[1]), "old_logprobs": torch.tensor(old[1])}
    batch = replace(batch, advantages=batch.per_token(torch.arange(12.0) - 6), **compared)
    update = measured(placement.update(batch))
    again = measured(placement.actor.logprobs(batch))
    return zip(*(sampled, reference, old, update, again), strict=True)


@pytest.mark.parametrize("name", PLACED)
def test_embeddings_are_sent_once_and_every_number_is_that_of_this_process(models, backend, cluster, name):
    sharding = {"sharding": {"sequence_parallel": 2}} if name == "sharing rows" else {}
    here = local(resolved_of(models, backend), Watchdog(0, Path()))
    resolved = resolved_of(models, backend, placement={"kind": "ray", **PLACED[name]}, **sharding)
    prompts = first_prompts(resolved, 4)
    embeds = len(prompts) * TOKENS * WIDTH * 4
    pixels = sum(prompt.vision["pixel_values"].nbytes for prompt in prompts)
    for placement in (here, there := registry.load("placements", "ray")(resolved, Watchdog(0, Path()))):
        placement.load("grpo")
        placement.start_engines()
        placement.sync_weights()
        placement.traffic()
    with there:
        read = there.encoder.embed(prompts)
        assert embeds + pixels < there.traffic()["placement/bytes"] < embeds + pixels + 0.1 * embeds
        sizes, ours = step(there, read)
        seen = here.encoder.embed(prompts)
        _, expected = step(here, seen)
        assert here.traffic() == {"placement/bytes": 0}
        for pool in there.pools:
            pool.store = Store()  # plain store: every call sends everything
        naive, _ = step(there, seen)
    for got, wanted in zip(ours, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    readers = 2 if name == "sharing rows" else 1
    assert sum(sizes) < 0.2 * embeds
    assert all(size > embeds for size in naive[:1]) and all(size > readers * embeds for size in naive[1:])


def test_pixels_of_a_tower_that_learns_are_sent_once_too(models, backend, cluster):
    resolved = resolved_of(models, backend, placement={"kind": "ray"})
    learning = resolved.config.model_copy(update={"model": resolved.config.model.model_copy(update={"freeze": []})})
    resolved = ResolvedModel(learning, backend)
    prompts = first_prompts(resolved, 4)
    pixels = sum(prompt.vision["pixel_values"].nbytes for prompt in prompts)
    with registry.load("placements", "ray")(resolved, Watchdog(0, Path())) as there:
        there.load("grpo")
        there.start_engines()
        there.sync_weights()
        there.traffic()
        assert there.encoder is None
        sizes, _ = step(there, prompts)
    assert pixels < sum(sizes) < 1.3 * pixels
