"""vLLM in this process: one request a prompt, and weight updates that prove what arrived."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlcore.distributed.fingerprint import Constants
from rlcore.protocols import ModelFamily
from rlcore.rollout.sampler import folded
from rlcore.runtime.memory import OffloadedTensors, awake, holding
from rlcore.types import Group, Prompt, Sample, Sampling

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
from .internals import _cache_of, _derives, _runner, _undisturbed_random_state


class VllmRollout:
    """Serves one model. Log-probabilities are of the distribution drawn from: after temperature, top_p and top_k.

    With temperature alone they equal the trainer's log_softmax(logits / temperature); top_p and top_k renormalise over what is
    left, which the trainer does not do.
    """

    def __init__(self, llm: LLM, family: ModelFamily, beat: Callable[[], None], sleep_level: int) -> None:
        """`sleep_level`: vLLM's; 0 where its sleep mode is off."""
        self._llm, self._beat = llm, beat
        self._adapter = family
        self._runner = _runner(llm)
        self.version: int | None = 0
        self._request: LoRARequest | None = None  # the additions that samples are drawn with
        self._level = sleep_level
        self._asleep, self._cached = False, True
        self._cache = OffloadedTensors(lambda: _cache_of(self._runner), keep=False)
        self._constants = Constants(self._runner.get_model(), _cache_of(self._runner), _derives)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group a prompt; the prompt is read once for all its samples."""
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """The same call gives the same tokens whatever came before: the prefix cache is emptied first, because whether a prompt
        comes from it changes rounding, and this process's random state is the call's own seed meanwhile."""
        awake(self._asleep, "sampling")
        version = holding(self.version)
        self._wake_cache()
        engine = self._llm.llm_engine
        self._llm.reset_prefix_cache()
        with _undisturbed_random_state(), self._emptied(len(prompts)):
            torch.manual_seed(folded(sampling.seed + (sampling.first << 40)))
            parameters = self._parameters(sampling)
            for place, prompt in enumerate(prompts):
                engine.add_request(str(place), _request(prompt), parameters.clone(), lora_request=self._request)
            while engine.has_unfinished_requests():
                self._beat()
                for output in engine.step():
                    if output.finished:
                        place = int(output.request_id)
                        yield place, Group(prompts[place], [self._sample(completion, version) for completion in output.outputs])

    def pause(self) -> None:
        """The key-value cache leaves the device. In vLLM's sleep mode the weights do too, which need to be sent again after its
        second level, and both return to the same addresses. Without it the weights stay: the next update overwrites them."""
        if self._level:
            self._wake_cache()  # before 0.32 vLLM refuses to put to sleep what sleeps in part
        self._constants.note()
        if self._level:
            self._llm.sleep(level=self._level)
            self.version = None if self._level == 2 else self.version
        elif self._cached:
            self._cache.pause()
        self._asleep, self._cached = True, False

    def resume(self) -> None:
        """The weights alone: the cache comes when there is something to sample, after the actor's weights have left. RunError
        names what else did not come back."""
        if self._level:
            self._llm.wake_up(tags=["weights"])
        self._check_wake("weights")
        self._asleep = False

    def device_bytes(self) -> int:
        if self._level and self._asleep:
            return 0
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in self._runner.get_model().state_dict().values()}
        cache = self._cache.device_bytes() if self._cached else 0  # asleep, its tensors look as they did
        return cache + sum(weights.values()) + self._packed_bytes()

    def _wake_cache(self) -> None:
        if self._cached:
            return
        if self._level:
            self._llm.wake_up(tags=["kv_cache"])
        else:
            self._cache.resume()
        self._check_wake("cache")
        self._cached = True

    def _check_wake(self, what: str) -> None:
        remedy = f"set backend.options.sleep_level={self._level - 1}" if self._level else "set rollout.engine=torch"
        event = f"waking the {what} of an engine that slept at level {self._level}"
        self._constants.check(event, remedy, given_up=self.version is None)

    def _check_update(self, version: int) -> None:
        remedy = "this version of the engine cannot be updated with this model: set rollout.engine=torch, or install another"
        self._constants.check(f"the update to version {version}", remedy, updated=True)

    def _packed_bytes(self) -> int:
        """Of weights that the engine keeps in a layout of its own, where no tensor shows them."""
        return 0

    @contextlib.contextmanager
    def _emptied(self, prompts: int) -> Iterator[None]:
        """What a stream leaves unfinished, because it failed or nobody read on, does not stay for the next one."""
        try:
            yield
        finally:
            self._llm.llm_engine.abort_request([str(place) for place in range(prompts)])

    def _forget(self) -> None:
        """Whatever was computed with the old weights."""
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def _parameters(self, sampling: Sampling) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=sampling.samples,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            logprobs=0,  # the drawn token's only
            stop_token_ids=sorted(self._adapter.stop_token_ids),
            ignore_eos=True,  # the adapter alone says what ends a turn
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,  # a prompt's samples together, when all are finished
        )

    def _sample(self, completion: Any, version: int) -> Sample:
        token_ids = list(completion.token_ids)
        drawn = zip(completion.logprobs, token_ids, strict=True)
        logprobs = np.fromiter((step[token].logprob for step, token in drawn), np.float32, len(token_ids))
        finish = "stop" if completion.finish_reason == "stop" else "length"
        return Sample(np.array(token_ids, np.int32), logprobs, self._adapter.decode(token_ids), finish, version)


def _request(prompt: Prompt) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": prompt.engine_token_ids}
    if prompt.vision and "image_embeds" in prompt.vision:
        request["multi_modal_data"] = {"image": dict(prompt.vision)}
    elif prompt.row.images:
        request["multi_modal_data"] = {"image": list(prompt.row.images)}
    return request
