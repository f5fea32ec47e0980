"""Samples that wait for their step come back from a checkpoint as they were."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rlcore.errors import ConfigError
from rlcore.train import pending
from rlcore.train.grpo import GrpoTask
from rlcore.train.sampling import Sampled, Scored
from rlcore.types import Group, Prompt, Receipt, Row, Sample, Score

EXPERTS = np.arange(180, dtype=np.uint8).reshape(-1, 3, 2)
PROMPTS = [Prompt(Row(f"row {number}", ()), [number], [number]) for number in range(4)]


def group(prompt, *lengths):
    samples = [
        Sample(np.arange(length) + 7, -np.arange(length) / 3, f"{length} tokens", "stop" if length < 3 else "length", length)
        for length in lengths
    ]
    return Group(prompt, samples)


def scores(count):
    return [Score(0.1 * number, parts={"a": 1 / 3}) for number in range(count - 1)] + [Score(None, "error", detail="why")]


SAMPLED = Sampled(
    Scored([group(PROMPTS[2], 1, 5), group(PROMPTS[0], 2, 3)], [scores(2), scores(2)]),
    Scored([group(PROMPTS[1], 4)], [scores(1)]), Receipt(3, 2, 100, 0.1, 0.05), drawn=9, dropped_long=2,
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    (tmp_path / pending.FILE).write_bytes(pending.packed(SAMPLED))
    return tmp_path / pending.FILE


def told_array(array):
    return array if array is None else (array.tobytes(), array.dtype, array.shape)


def told(sampled):
    """Everything in it, in a form that compares."""
    both = [*sampled.kept.groups, *sampled.replaced.groups]
    samples = [
        (*(told_array(getattr(one, name)) for name in pending._ARRAYS), one.text, one.finish, one.policy_version)
        for group in both for one in group.samples
    ]  # fmt: skip
    prompts = [(group.prompt.row.id, group.prompt.token_ids, len(group.samples)) for group in both]
    return (
        len(sampled.kept.groups), prompts, samples, sampled.kept.scores, sampled.replaced.scores, sampled.receipt,
        sampled.drawn, sampled.dropped_long,
    )  # fmt: skip


def test_they_come_back_with_the_prompts_drawn_again(path):
    assert told(pending.unpacked(path, lambda count: PROMPTS[:count])) == told(SAMPLED)


def test_so_do_the_experts_of_their_tokens(path):
    def routed(scored):
        return replace(scored, groups=[
            replace(group, samples=[replace(one, experts=EXPERTS[: len(one.token_ids)]) for one in group.samples])
            for group in scored.groups
        ])  # fmt: skip

    sampled = replace(SAMPLED, kept=routed(SAMPLED.kept), replaced=routed(SAMPLED.replaced))
    path.write_bytes(pending.packed(sampled))
    assert told(pending.unpacked(path, lambda count: PROMPTS[:count])) == told(sampled) != told(SAMPLED)


def test_other_rows_are_refused(path):
    with pytest.raises(ConfigError, match="samples of row row 0, which data"):
        pending.unpacked(path, lambda count: PROMPTS[1 : count + 1])


def test_an_interrupt_waits_for_none_and_a_save_for_all():
    sampling = Future()
    task = SimpleNamespace(sampling={2: sampling})
    assert GrpoTask.files(task, 1, patient=False) == {}
    assert GrpoTask.files(task, 2, patient=True) == {}, "of another step"
    sampling.set_result(SAMPLED)
    assert GrpoTask.files(task, 1, patient=False) == GrpoTask.files(task, 1, patient=True) == {
        pending.FILE: pending.packed(SAMPLED)
    }
    failed = Future()
    failed.set_exception(RuntimeError("the engine died"))
    assert GrpoTask.files(SimpleNamespace(sampling={2: failed}), 1, patient=True) == {}, "its step raises it"
