"""Rollout engine over HTTP servers of any engine that has an `EngineApi`."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlcore.errors import Remedy, RunError
from rlcore.protocols import ModelFamily
from rlcore.runtime.memory import awake, holding
from rlcore.types import Group, NamedTensors, Prompt, Receipt, Sample, Sampling

from .api import Answer, Completion, EngineApi, Limits
from .client import Server, WrongAnswer
from .fleet import Fleet, Job

_ROUNDING = 1e-3  # by which a log-probability may exceed 0
_LEAST = -9999.0  # at which vLLM puts NaN and -inf
_APART = 4096  # seeds of each prompt
_QUEUED = 2  # times the samples that a server decodes at a time: what it is given, so that it never waits for more


class ServerRollout:
    """Samples on all servers of a fleet, and sends each of them every weight update."""

    def __init__(self, fleet: Fleet, api: EngineApi, family: ModelFamily) -> None:
        """Examines the servers: ConfigError for one that cannot be used."""
        self._fleet, self._api, self._family = fleet, api, family
        self.version: int | None = 0
        self._asleep = False
        self._limits: Mapping[Server, Limits] = fleet.each(api.examine)
        fleet.room = {server: _QUEUED * limits.samples for server, limits in self._limits.items()}
        self._held = {server: limits.bytes for server, limits in self._limits.items()}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt, in order."""
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """Yield (prompt index, group) as servers finish. Every prompt has a seed of its own, so that its samples depend on
        neither the server nor the other prompts, except by rounding. Leaving early aborts what is outstanding."""
        awake(self._asleep, "sampling")
        version = holding(self.version)
        self._fleet.each(self._api.forget)
        answers: queue.SimpleQueue[tuple[int, Server, Any] | None] = queue.SimpleQueue()
        jobs = [self._job(prompt, sampling, place) for place, prompt in enumerate(prompts)]
        work = self._fleet.loop.start(self._generate(jobs, answers))
        try:
            while (item := answers.get()) is not None:
                place, server, answer = item
                yield place, self._group(prompts[place], sampling, server, answer, version)
            work.result()
        finally:
            if not work.done():
                work.cancel()
                while answers.get() is not None:
                    pass

    def pause(self) -> None:
        """Free the servers' device memory, as far as their engine can; weights that it discards must be sent again."""
        self._held = self._fleet.each(self._api.pause)
        self._asleep = True

    def resume(self) -> None:
        self._held = self._fleet.each(self._api.resume)
        self._asleep = False

    def device_bytes(self) -> int:
        return sum(self._held[server] for server in self._fleet.servers)

    def relief(self) -> Sequence[Remedy]:
        """None: the memory is the servers'."""
        return ()

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """RunError names the server, and the tensors that it does not hold as they were sent."""
        awake(self._asleep, "a weight update")
        started = time.perf_counter()
        self.version = None  # until every server has confirmed it
        sent = self._api.send(self._fleet, weights, version)
        self.version = version
        return Receipt(version, sent.tensors, sent.bytes, time.perf_counter() - started, sent.check_seconds)

    async def _generate(self, jobs: Sequence[Job], answers: queue.SimpleQueue[tuple[int, Server, Any] | None]) -> None:
        try:
            await self._fleet.generate(jobs, self._api.progress, lambda *answer: answers.put(answer))
        finally:
            answers.put(None)

    def _job(self, prompt: Prompt, sampling: Sampling, place: int) -> Job:
        path, body = self._api.request(prompt, sampling, seed_of(sampling.seed, sampling.first + place))
        return Job(path, body, sampling.samples, len(prompt.token_ids) + sampling.samples * sampling.max_new_tokens)

    def _group(self, prompt: Prompt, sampling: Sampling, server: Server, answer: Any, version: int) -> Group:
        try:
            read = self._api.read(answer)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise WrongAnswer(f"{server} answered {prompt.row.id} in another form: {error!r} in {str(answer)[:500]}") from error
        self._check(prompt, sampling, server, read)
        return Group(prompt, [self._sample(prompt, sampling, server, one, version) for one in read.completions])

    def _check(self, prompt: Prompt, sampling: Sampling, server: Server, answer: Answer) -> None:
        if len(answer.completions) != sampling.samples:
            raise WrongAnswer(f"{server}: {prompt.row.id}: {len(answer.completions)} samples, of {sampling.samples} requested")
        if list(answer.prompt_token_ids) != prompt.token_ids:
            raise RunError(
                f"{server}: {prompt.row.id}: the engine read {len(answer.prompt_token_ids)} tokens, the trainer's prompt has"
                f" {len(prompt.token_ids)}: they scale images differently; set vision.min_pixels and vision.max_pixels"
            )

    def _sample(self, prompt: Prompt, sampling: Sampling, server: Server, one: Completion, version: int) -> Sample:
        vocabulary = self._limits[server].vocabulary
        if fault := next(_faults(one, sampling, vocabulary, self._family.stop_token_ids, str(version)), None):
            raise WrongAnswer(f"{server}: {prompt.row.id}: {fault}; samples from it would not be the policy's")
        tokens, logprobs = np.array(one.token_ids, np.int32), np.array(one.logprobs, np.float32)
        finish = "stop" if one.finish == "stop" else "length"
        return Sample(tokens, logprobs, self._family.decode(list(one.token_ids)), finish, version)


def seed_of(seed: int, place: int) -> int:
    """31 bits for the prompt at this global index. A server adds the number of a sample to its prompt's seed, so those of two
    prompts lie further apart than a group has samples."""
    first = int(np.random.SeedSequence(seed % 2**63).generate_state(1)[0])
    return (first + place * _APART) % 2**31


def _faults(one: Completion, sampling: Sampling, vocabulary: int, stops: frozenset[int], version: str) -> Iterator[str]:
    """What cannot be right about a completion."""
    tokens, logprobs = one.token_ids, one.logprobs
    if len(tokens) != len(logprobs):
        yield f"{len(logprobs)} log-probabilities for {len(tokens)} tokens"
    if not 0 < len(tokens) <= sampling.max_new_tokens:
        yield f"{len(tokens)} tokens, of 1 to {sampling.max_new_tokens} requested"
    if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
        yield f"token {wrong[0]} is not in the vocabulary of {vocabulary}"
    if wrong := [value for value in logprobs if not _LEAST < value <= _ROUNDING]:
        yield f"{wrong[0]} is no log-probability"
    if one.finish not in ("stop", "length"):
        yield f"the sample ended by {one.finish!r}"
    if one.finish == "stop" and tokens and tokens[-1] not in stops:
        yield f"the sample ended by {one.finish!r} at token {tokens[-1]}"
    if set(one.versions) != {version}:
        yield f"it was drawn with the weights {', '.join(one.versions) or 'of no known version'}, not {version}"
