"""Requests over several servers: balance, failures and wrong answers."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from rlcore_backends.server.client import Server
from rlcore_backends.server.fleet import Fleet
from rlcore_backends.server.rollout import ServerRollout, seed_of
from small_engine import VOCABULARY, SmallApi, SmallEngine, sample

from rlcore.errors import RunError
from rlcore.types import Prompt, Row, Sampling

SAMPLING = Sampling(samples=2, max_new_tokens=3, seed=5)


class Letters:
    stop_token_ids = frozenset({7})

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(Row(f"row {number}", ()), [number], [number]) for number in range(count)]


def rollout(*engines: SmallEngine, seconds: float = 30.0, beat=lambda: None) -> ServerRollout:
    fleet = Fleet([Server(engine.address, seconds) for engine in engines], seconds, beat)
    return ServerRollout(fleet, SmallApi(), Letters())


def tokens(groups):
    return [[sample.token_ids.tolist() for sample in group.samples] for group in groups]


def test_samples_do_not_depend_on_the_server_that_draws_them():
    one, other = SmallEngine(), SmallEngine(seconds=0.02)
    drawn = tokens(rollout(one).generate(prompts(12), SAMPLING))
    assert tokens(rollout(one, other).generate(prompts(12), SAMPLING)) == drawn
    assert tokens(rollout(one).generate(prompts(12), Sampling(2, 3, seed=6))) != drawn
    assert one.answered > 24 and other.answered > 0


def test_part_of_a_call_draws_what_the_whole_call_draws_there():
    whole = tokens(rollout(engine := SmallEngine()).generate(prompts(6), SAMPLING))
    part = Sampling(2, 3, seed=5, first=4)
    assert tokens(rollout(engine).generate(prompts(6)[4:], part)) == whole[4:]


def test_the_seeds_of_neighbouring_prompts_lie_apart():
    """A server adds the number of a sample to the seed of its prompt."""
    seeds = sorted(seed_of(3, place) for place in range(5000))
    assert min(after - before for before, after in pairwise(seeds)) >= 4096 and 0 <= seeds[0] <= seeds[-1] < 2**31
    assert len({seed_of(seed, 0) for seed in range(100)}) == 100


def test_a_faster_server_gets_more_and_none_more_than_it_has_room_for():
    fast, slow = SmallEngine(seconds=0.01), SmallEngine(seconds=0.3)
    rollout(fast, slow).generate(prompts(40), SAMPLING)
    assert fast.answered > 2 * slow.answered > 0
    assert max(fast.most, slow.most) <= 8, "twice the samples that a server decodes at a time"
    assert len(fast.connections) <= 4, "connections are kept"


def test_requests_go_where_the_fewest_tokens_are_outstanding():
    one, other = SmallEngine(seconds=0.3), SmallEngine(seconds=0.3)
    long = Prompt(Row("long", ()), [1] * 500, [1] * 500)
    rollout(one, other).generate([long, *prompts(3)], SAMPLING)
    assert sorted([one.answered, other.answered]) == [1, 3]


def test_a_request_larger_than_the_room_is_sent_alone():
    engine = SmallEngine()
    groups = rollout(engine).generate(prompts(3), Sampling(samples=20, max_new_tokens=1))
    assert [len(group.samples) for group in groups] == [20, 20, 20] and engine.most == 20


def test_another_server_takes_the_requests_of_one_that_dies(capfd):
    mortal, other = SmallEngine(seconds=5), SmallEngine(seconds=0.01)
    expected = tokens(rollout(other).generate(prompts(8), SAMPLING))
    over = rollout(mortal, other)
    stream = over.stream(prompts(8), SAMPLING)
    groups = dict([next(stream)])
    mortal.die()
    groups |= dict(stream)
    assert tokens(groups[place] for place in range(8)) == expected
    assert mortal.address in (said := capfd.readouterr().err) and "1 other server" in said
    assert tokens(over.generate(prompts(8), SAMPLING)) == expected, "it goes on without it"


def test_the_death_of_the_last_server_ends_the_run_and_names_it():
    engine = SmallEngine(seconds=5)
    over = rollout(engine)
    engine.die()
    with pytest.raises(RunError, match=f"{engine.address}.*no other server"):
        over.generate(prompts(2), SAMPLING)


def test_a_server_that_computes_nothing_more_is_named_and_replaced(capfd):
    stalled, other = SmallEngine(seconds=60), SmallEngine()
    stalled.progresses = False
    beats = []
    groups = rollout(stalled, other, seconds=1.0, beat=lambda: beats.append(1)).generate(prompts(6), SAMPLING)
    assert len(groups) == 6 and len(beats) >= 6
    assert "has computed no token for" in (said := capfd.readouterr().err) and stalled.address in said
    assert stalled.broken_off > 0, "its requests are given up"


def test_a_slow_server_that_makes_progress_is_waited_for():
    slow = SmallEngine(seconds=2.5)
    count = iter(range(1000))

    class Busy(SmallApi):
        async def progress(self, server):
            return next(count)

    fleet = Fleet([Server(slow.address, 1.0)], 1.0, lambda: None)
    assert len(ServerRollout(fleet, Busy(), Letters()).generate(prompts(1), SAMPLING)) == 1


def test_a_server_that_answers_nothing_at_all_is_lost():
    engine = SmallEngine()
    over = rollout(engine, seconds=0.5)
    engine.loop.call_soon_threadsafe(time.sleep, 2.0)
    with pytest.raises(RunError, match=f"{engine.address} has not answered GET /health for 0.5 s"):
        over.generate(prompts(1), SAMPLING)


def of(change):
    """Change the first sample of an answer."""

    def changed(answer):
        change(answer["samples"][0])

    return changed


WRONG = {
    "2 log-probabilities for 3 tokens": of(lambda one: one["logprobs"].pop()),
    "0 tokens, of 1 to 3": of(lambda one: one.update(tokens=[], logprobs=[])),
    "4 tokens, of 1 to 3": of(lambda one: one.update(sample([1, 2, 3, 4]))),
    f"token {VOCABULARY} is not in the vocabulary of {VOCABULARY}": of(lambda one: one["tokens"].__setitem__(1, VOCABULARY)),
    "token -1 is not in the vocabulary": of(lambda one: one["tokens"].__setitem__(1, -1)),
    "0.5 is no log-probability": of(lambda one: one["logprobs"].__setitem__(2, 0.5)),
    "-9999.0 is no log-probability": of(lambda one: one["logprobs"].__setitem__(2, -9999.0)),
    "nan is no log-probability": of(lambda one: one["logprobs"].__setitem__(2, float("nan"))),
    "ended by 'abort'": of(lambda one: one.update(finish="abort")),
    "ended by 'stop' at token": of(lambda one: one.update(finish="stop", tokens=[1, 2, 3])),
    "drawn with the weights 4, not 0": of(lambda one: one.update(versions=["4"])),
    "drawn with the weights 0, 1, not 0": of(lambda one: one.update(versions=["0", "1"])),
    "1 samples, of 2 requested": lambda answer: answer["samples"].pop() and None,
    "the engine read 2 tokens, the trainer's prompt has 1": lambda answer: answer["prompt"].append(9),
    "in another form: KeyError": of(lambda one: one.pop("finish") and None),
    "in another form: TypeError": lambda answer: [1],
}


@pytest.mark.parametrize("message", WRONG)
def test_an_answer_that_cannot_be_right_names_server_and_row(message):
    engine = SmallEngine(change=WRONG[message])
    with pytest.raises(RunError, match=f"{engine.address}.*row 0.*{message}"):
        rollout(engine).generate(prompts(1), SAMPLING)


def test_an_error_of_a_healthy_server_is_not_sent_elsewhere():
    bad, other = SmallEngine(status=400, seconds=0.1), SmallEngine(seconds=0.1)
    with pytest.raises(RunError, match=f"{bad.address} answered POST /generate with 400: it is not well"):
        rollout(bad, other).generate(prompts(4), SAMPLING)
    assert other.broken_off or other.answered < 4, "the rest is given up"


def test_an_error_of_an_unhealthy_server_is_its_death(capfd):
    bad, other = SmallEngine(status=500), SmallEngine()
    over = rollout(bad, other)
    bad.healthy = False
    assert len(over.generate(prompts(4), SAMPLING)) == 4
    assert bad.address in capfd.readouterr().err


def test_a_stream_that_is_left_aborts_what_is_outstanding():
    engine = SmallEngine(seconds=1.0)
    over = rollout(engine)
    stream = over.stream(prompts(8), SAMPLING)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 5
    while (engine.running or not engine.broken_off) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.running == 0 and engine.broken_off >= 1
    engine.seconds = 0.0
    assert len(over.generate(prompts(2), SAMPLING)) == 2
