"""No micro-batch above the token cap, no token lost or duplicated."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcore.distributed.balance import over_ranks
from rlcore.errors import ConfigError
from rlcore.model import packing
from rlcore.model.packing import deal, microbatches, plan_microbatches
from rlcore.types import Batch, Group, Prompt, Row, Sample

lengths = st.integers(1, 60)
shapes = st.lists(st.tuples(lengths, st.lists(lengths, min_size=1, max_size=8)), min_size=1, max_size=12)


def group(name: str, prompt: int, responses: list[int]) -> Group:
    ids = list(range(10, 10 + prompt))
    tokens = [list(range(100 * (i + 1), 100 * (i + 1) + n)) for i, n in enumerate(responses)]
    return Group(Prompt(Row(name, []), ids, ids), [Sample(one, [-1.0] * len(one), "", "stop", 0) for one in tokens])


@settings(max_examples=300, deadline=None)
@given(shapes, st.integers(120, 400))
def test_the_cap_holds_and_every_sample_is_in_one_piece(groups, cap):
    bins = plan_microbatches(groups, cap)
    assert all(sum(piece.tokens for piece in pieces) <= cap for pieces in bins)
    assert all(pieces for pieces in bins)
    placed = sorted((piece.group, sample) for pieces in bins for piece in pieces for sample in piece.samples)
    assert placed == [(g, s) for g, (_, responses) in enumerate(groups) for s in range(len(responses))]


def test_ten_thousand_batches_stay_under_the_cap_and_are_spread_over_ranks():
    """Long-tailed lengths, as of responses; in every fourth batch the cap just fits the longest sample."""
    random = np.random.default_rng(0)
    for number in range(10_000):
        prompts = random.integers(1, 200, random.integers(1, 12))
        groups = [(int(n), random.lognormal(4, 1, random.integers(1, 9)).astype(int).clip(1, 1000).tolist()) for n in prompts]
        longest = max(prompt + max(responses) - 1 for prompt, responses in groups)
        cap = longest if number % 4 == 0 else longest + int(random.integers(0, 2000))
        bins = plan_microbatches(groups, cap)
        assert max(sum(piece.tokens for piece in pieces) for pieces in bins) <= cap
        assert sum(len(piece.samples) for pieces in bins for piece in pieces) == sum(len(each) for _, each in groups)
        sizes = [prompt + sum(responses) for prompt, responses in groups]
        shares = over_ranks(sizes, ranks=4)
        assert sorted(group for share in shares for group in share) == list(range(len(groups)))
        assert max(sum(sizes[group] for group in share) for share in shares) <= sum(sizes) / 4 + max(sizes)


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(120, 400))
def test_packed_rows_hold_every_target_once_and_no_more_tokens_than_planned(groups, cap):
    batch = Batch.of([group(f"row {i}", prompt, responses) for i, (prompt, responses) in enumerate(groups)])
    flat = torch.tensor([token for sample in batch.samples for token in sample.token_ids.tolist()])
    rebuilt = torch.full_like(flat, -1)
    for packed in microbatches(batch, cap):
        assert packed.tokens == sum(segment.tokens for segment in packed.segments) <= cap
        assert len(packed.position_ids) == packed.tokens
        assert (rebuilt[packed.index] == -1).all()
        rebuilt[packed.index] = packed.targets
    assert torch.equal(rebuilt, flat)


def test_each_prompt_is_forwarded_once_when_its_group_fits():
    batch = Batch.of([group("a", 50, [10] * 8)])
    (packed,) = microbatches(batch, 1000)
    assert packed.tokens == 50 + 8 * 9


def test_the_source_of_each_target_is_the_token_before_it():
    batch = Batch.of([group("a", 3, [2, 3]), group("b", 2, [1])])
    (packed,) = microbatches(batch, 1000)
    before = packed.input_ids[packed.predictors].tolist()
    assert before == [12, 100, 12, 200, 201, 11]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]


def test_a_sample_above_the_cap_is_named_with_the_numbers():
    batch = Batch.of([group("train:17", 50, [10, 80])])
    with pytest.raises(ConfigError, match=r"train:17: sample 1 needs 129 tokens .*max_tokens_per_microbatch 100"):
        microbatches(batch, 100)


def test_a_group_above_the_cap_is_split_and_its_prompt_repeated():
    batch = Batch.of([group("a", 50, [20] * 4)])
    rows = microbatches(batch, 100)
    assert [row.tokens for row in rows] == [88, 88]
    assert [len(row.targets) for row in rows] == [40, 40]


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_plan_serves_every_pass_over_the_same_samples(monkeypatch, ranks):
    """Reference, old log-probabilities and an update of one optimizer step; a plan depends only on lengths and the cap."""
    asked, real = [], packing.plan_microbatches
    noted = lambda groups, cap, names=None: asked.append(cap) or real(groups, cap, names)  # noqa: E731
    monkeypatch.setattr(packing, "plan_microbatches", noted)
    packing._planned.cache_clear()
    batch = Batch.of([group(f"row {number}", 10 + number, [number + 1, 20, 30]) for number in range(9)])
    first = [part for part, _ in deal(batch, ranks, 100)]
    assert asked == [100] * ranks
    rows = [microbatches(part, 100) for part in first]
    updated = replace(batch, advantages=torch.zeros(len(batch.loss_mask)), old_logprobs=batch.rollout_logprobs)
    for part, before in zip((part for part, _ in deal(updated, ranks, 100)), rows, strict=True):
        again = microbatches(part, 100)
        assert [row.segments for row in again] == [row.segments for row in before]
    assert asked == [100] * ranks
    deal(batch, ranks, 120)
    assert asked == [100] * ranks + [120] * ranks


def test_samples_hold_arrays_whatever_they_are_made_of():
    for tokens in ([3, 4], (3, 4), np.array([3, 4])):
        sample = Sample(tokens, [-1, -2.5], "", "stop", 0)
        assert sample.token_ids.dtype == np.int32 and sample.token_ids.tolist() == [3, 4]
        assert sample.logprobs.dtype == np.float32 and sample.logprobs.tolist() == [-1, -2.5]


def test_a_deal_gives_every_token_to_one_rank_with_all_that_is_known_of_it():
    batch = Batch.of([group(str(number), 4, [number + 1, 2, 7]) for number in range(7)])
    numbers = torch.arange(len(batch.loss_mask))
    batch = replace(batch, advantages=numbers.float(), loss_mask=numbers % 3 == 0, loss_weights=-numbers.float())
    parts = deal(batch, 3, 100)
    assert torch.equal(torch.cat([places for _, places in parts]).sort().values, numbers)
    for part, places in parts:
        assert torch.equal(part.advantages, places.float()) and torch.equal(part.loss_weights, -places.float())
        assert torch.equal(part.loss_mask, places % 3 == 0) and part.old_logprobs is None
        tokens = np.concatenate([sample.token_ids for sample in batch.samples])[places]
        assert tokens.tolist() == [token for sample in part.samples for token in sample.token_ids]


def test_a_share_of_a_batch_keeps_its_own_tokens():
    batch = Batch.of([group(str(i), 4, [i + 1, 2]) for i in range(4)])
    share = batch.select(range(1, 3))
    assert [g.prompt.row.id for g in share.groups] == ["1", "2"]
    assert len(share.rollout_logprobs) == (2 + 2) + (3 + 2)


def test_ranks_make_the_same_number_of_passes():
    """The rank with less work runs passes without targets, because every pass all-gathers weights."""
    batch = Batch.of([group("long", 50, [40, 40, 40]), group("short", 4, [2])])
    rows = [microbatches(part, 100) for part, _ in deal(batch, 2, 100)]
    assert [len(each) for each in rows] == [3, 3]
    assert sorted(sum(bool(len(row.targets)) for row in each) for each in rows) == [1, 3]
