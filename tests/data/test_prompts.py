"""The stream of prompts: checks, order, mixtures, position, reading ahead."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import LetterFamily, letters

from rlcore.config.sections import DataConfig
from rlcore.data.order import Order
from rlcore.data.prompts import Encoded, PromptSource, RowFilter, TrainingSet
from rlcore.data.sources import training_prompts
from rlcore.errors import ConfigError


def source(count, limit=100, seed=0, family=None, unread=False):
    family = family or LetterFamily()
    rows = RowFilter(family, limit)
    if unread:
        return PromptSource([TrainingSet(letters(count))], family.encode_all, seed, rows.fits)
    kept = rows.fitting(letters(count))
    return PromptSource([TrainingSet(kept, None, kept.dropped_long)], family.encode_all, seed)


def ids(prompts):
    return [prompt.row.id for prompt in prompts]


@pytest.mark.parametrize(("count", "step"), [(5, 1), (5, 3), (4, 4), (3, 7)])
def test_each_epoch_is_a_permutation(count, step):
    stream, drawn = source(count, seed=3), []
    while len(drawn) < 6 * count:
        drawn += ids(stream.draw(step))
    epochs = [drawn[start : start + count] for start in range(0, 6 * count, count)]
    assert all(sorted(epoch) == sorted(row.id for row in letters(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("place", [0, 2, 5, 11])
def test_a_source_resumed_by_its_integer_goes_on_as_if_never_stopped(place, unread):
    whole, rest = source(9, 6, 1, unread=unread), source(9, 6, 1, unread=unread)
    before = ids(whole.draw(place)) if place else []
    rest.draw(1)  # another place, and begins those after it
    rest.drawn = whole.drawn
    after = ids(whole.draw(20 - place))
    assert ids(rest.draw(20 - place)) == after and rest.drawn == whole.drawn
    assert before + after == ids(source(9, 6, 1, unread=unread).draw(20))


def test_the_seed_decides_the_order():
    orders = [ids(source(20, seed=seed).draw(20)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("unread", [False, True])
def test_long_prompts_are_dropped_and_counted(unread):
    stream = source(5, 3, unread=unread)
    found = ids(stream.draw(9))
    assert set(found) == {"r:0", "r:1", "r:2"} and Counter(found).most_common()[-1][1] == 3
    assert stream.unread == unread and len(stream) == (5 if unread else 3)
    assert stream.dropped_long == 2 if not unread else 4 <= stream.dropped_long <= 6  # two in each pass


def test_a_refused_long_prompt_is_named_with_its_numbers():
    rows = RowFilter(LetterFamily(), 3, "refuse")
    with pytest.raises(ConfigError, match=r"r:3: 4 prompt tokens, .*max_prompt_tokens is 3 \(2 of 5 rows .*raise it to 5"):
        rows.fitting(letters(5))
    with pytest.raises(ConfigError, match=r"r:4: 5 prompt tokens, .*max_prompt_tokens is 3; raise it to at least 5"):
        rows.fits(letters(5)[4])


def test_no_prompt_left_is_said_with_the_shortest():
    with pytest.raises(ConfigError, match=r"all 3 prompts are longer than data\.max_prompt_tokens 1; the shortest has 2"):
        RowFilter(LetterFamily(), 1).fitting(letters(4)[1:])
    with pytest.raises(ConfigError, match=r"all 3 prompts are longer than data\.max_prompt_tokens"):
        PromptSource([TrainingSet(letters(4)[1:])], LetterFamily().encode_all, 0, RowFilter(LetterFamily(), 1).fits).draw(1)


def test_prompts_are_encoded_once_while_they_fit_the_cache():
    family = LetterFamily()
    source(4, family=family).draw(40)
    assert family.encoded == 4


def test_the_cache_is_bounded_and_changes_nothing():
    family = LetterFamily()
    prompts = Encoded(letters(4), family.encode, cache_bytes=1500)
    tokens = [[prompt.token_ids for prompt in prompts] for _ in range(3)]
    assert tokens[0] == tokens[1] == tokens[2] and family.encoded == 12
    assert prompts._held <= 1500 and prompts._held == sum(32 * 2 * len(p.token_ids) + 1000 for p in prompts._cache.values())


def test_evaluation_prompts_are_each_row_once_in_order():
    kept = RowFilter(LetterFamily(), 4).fitting(letters(5))
    prompts = Encoded(kept, LetterFamily().encode, dropped_long=kept.dropped_long)
    assert prompts.dropped_long == 1 and RowFilter(LetterFamily(), 5).fitting(letters(5)).dropped_long == 0
    assert ids(prompts) == [f"r:{i}" for i in range(4)] == ids(prompts[0:4])
    assert prompts[-1].row.id == "r:3"


def test_the_next_prompts_are_encoded_while_others_are_used():
    family = LetterFamily()
    stream = source(20, family=family)
    stream.draw(3)
    stream._thread.submit(int).result()  # what was begun before it is done
    assert family.encoded == 6
    waiting = threading.Event()
    stream._thread.submit(waiting.wait, 20)
    assert len(stream.draw(3)) == 3, "they need no more work"
    waiting.set()


def test_a_broken_row_is_an_error_when_it_is_drawn_and_not_before():
    def check(row):
        if row.id == "r:3":
            raise ConfigError("r:3: broken")

    rows = RowFilter(LetterFamily(), 9, check=check)
    stream = PromptSource([TrainingSet(letters(6))], LetterFamily().encode_all, 0, rows.fits)
    before = [row for _, row in map(stream._order.at, range(6))].index(3)
    stream.draw(before)  # the broken one is encoded ahead
    with pytest.raises(ConfigError, match="r:3: broken"):
        stream.draw(1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_a_mixture_gives_each_data_set_its_share_and_every_row_its_turn(sizes, weights, seed):
    weights = weights[: len(sizes)]
    order = Order(sizes, weights, seed)
    places = [order.at(place) for place in range(2000)]
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        drawn = [row for which, row in places if which == number]
        assert abs(len(drawn) / 2000 - weight / sum(weights)) < 0.004
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == list(range(size))
    assert Order(sizes, weights, seed).at(1777) == places[1777], "a place says it all"


def test_without_weights_every_row_of_a_mixture_is_drawn_as_often():
    order = Order([3, 5], seed=2)
    assert sorted(order.at(place) for place in range(8)) == [(0, 0), (0, 1), (0, 2), *((1, row) for row in range(5))]


@pytest.mark.parametrize(("check", "unread"), [("auto", False), ("all", False), ("drawn", True)])
def test_the_run_file_says_when_rows_are_read(check, unread, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"prompt": "x{"x" * i}", "answer": "1"}}\n' for i in range(4)))
    config = DataConfig(train={"path": str(path)}, check=check)
    assert training_prompts(config, LetterFamily(), 0).unread == unread


def test_ids_of_a_mixture_say_the_source(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "xx", "answer": "1"}\n')
    sets = [{"path": str(tmp_path / f"{name}.jsonl"), "source": name, "weight": 1} for name in "ab"]
    config = DataConfig(train=sets)
    drawn = training_prompts(config, LetterFamily(), 0).draw(40)
    assert {(prompt.row.id, prompt.row.source) for prompt in drawn} == {("a/a:1", "a"), ("b/b:1", "b")}
    assert np.ptp(list(Counter(ids(drawn)).values())) < 16
