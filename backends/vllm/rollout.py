"""vLLM in this process: one request per prompt, and weight updates that verify what arrived."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from rlcore.distributed.fingerprint import Constants
from rlcore.errors import Remedy, RunError
from rlcore.protocols import ModelFamily
from rlcore.rollout.sampler import folded
from rlcore.runtime.memory import OffloadedTensors, awake, holding
from rlcore.types import Group, Prompt, Sample, Sampling

from .internals import clear_scratch, derives_from_weights, kv_cache_tensors, model_runner, preserved_random_state

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest


class VllmRollout:
    """Rollout engine of one model. Log-probabilities are those of the sampling distribution: after temperature, top_p, top_k.

    With temperature alone they equal the trainer's log_softmax(logits / temperature); top_p and top_k renormalise over the
    tokens they keep, which the trainer does not do.
    """

    def __init__(self, llm: LLM, family: ModelFamily, beat: Callable[[], None], sleep_level: int) -> None:
        """`sleep_level`: vLLM's sleep level; 0 where its sleep mode is off."""
        self._llm, self._beat = llm, beat
        self._family = family
        self._runner = model_runner(llm)
        self.version: int | None = 0
        self.relief: Callable[[], Sequence[Remedy]] = tuple  # settings with which it would need less memory
        self._request: LoRARequest | None = None  # the LoRA weights to sample with
        self._level = sleep_level
        self._asleep, self._cached = False, True
        self._cache = OffloadedTensors(lambda: kv_cache_tensors(self._runner), keep=False)
        self._constants = Constants(self._runner.get_model(), kv_cache_tensors(self._runner), derives_from_weights)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt, in order; a prompt is prefilled once for all its samples."""
        groups = dict(self.stream(prompts, sampling))
        return [groups[place] for place in range(len(prompts))]

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple[int, Group]]:
        """Yield (prompt index, group) as groups finish. A call's tokens do not depend on earlier calls: the prefix cache is
        emptied first, because a cache hit changes rounding, and the process's random state follows the call's seed."""
        awake(self._asleep, "sampling")
        version = holding(self.version)
        self._wake_cache()
        engine = self._llm.llm_engine
        self._llm.reset_prefix_cache()
        with preserved_random_state(), self._emptied(len(prompts)):
            torch.manual_seed(folded(sampling.seed + (sampling.first << 40)))
            parameters = self._parameters(sampling)
            for place, prompt in enumerate(prompts):
                engine.add_request(str(place), _request(prompt), parameters.clone(), lora_request=self._request)
            while engine.has_unfinished_requests():
                self._beat()
                for output in cast("list[RequestOutput]", engine.step()):  # the others are of pooling models
                    if output.finished:
                        place = int(output.request_id)
                        _check_prompt(prompts[place], output)
                        yield place, Group(prompts[place], [self._sample(completion, version) for completion in output.outputs])

    def pause(self) -> None:
        """Free the key-value cache's device memory, and in vLLM's sleep mode the weights' too: both return to the same
        addresses, and level 2 discards the weights, which must be sent again. Without sleep mode the weights stay: the next
        update overwrites them."""
        if self._level:
            self._wake_cache()  # before 0.32 vLLM refuses to sleep while part of it sleeps
        self._constants.note()
        if self._level:
            self._llm.sleep(level=self._level)
            self.version = None if self._level == 2 else self.version
        elif self._cached:
            self._cache.pause()
        self._asleep, self._cached = True, False

    def resume(self) -> None:
        """Onload the weights only; the key-value cache follows at the next sampling, when the actor's weights are offloaded.
        RunError names whatever else did not come back."""
        if self._level:
            self._llm.wake_up(tags=["weights"])
            clear_scratch(self._runner)
        self._check_wake("weights")
        self._asleep = False

    def device_bytes(self) -> int:
        if self._level and self._asleep:
            return 0
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in self._runner.get_model().state_dict().values()}
        cache = self._cache.device_bytes() if self._cached else 0  # asleep, its tensors look unchanged
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
        """Bytes of weights that the engine keeps in a packed layout, where no tensor shows them."""
        return 0

    @contextlib.contextmanager
    def _emptied(self, prompts: int) -> Iterator[None]:
        """Abort a stream's unfinished requests on exit: it failed, or its reader stopped."""
        try:
            yield
        finally:
            self._llm.llm_engine.abort_request([str(place) for place in range(prompts)])

    def _forget(self) -> None:
        """Drop what was computed with the old weights: prefix and encoder caches."""
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
            stop_token_ids=sorted(self._family.stop_token_ids),
            ignore_eos=True,  # only the family's stop tokens end a turn
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,  # all samples of a prompt at once, when the last is finished
        )

    def _sample(self, completion: Any, version: int) -> Sample:
        token_ids = list(completion.token_ids)
        drawn = zip(completion.logprobs, token_ids, strict=True)
        logprobs = np.fromiter((step[token].logprob for step, token in drawn), np.float32, len(token_ids))
        finish = "stop" if completion.finish_reason == "stop" else "length"
        return Sample(np.array(token_ids, np.int32), logprobs, self._family.decode(token_ids), finish, version)


def _check_prompt(prompt: Prompt, output: RequestOutput) -> None:
    """RunError where the engine made another number of tokens of a prompt's images than the trainer, which would take its
    samples for answers to what the trainer reads."""
    if output.prompt_token_ids != prompt.token_ids:
        raise RunError(
            f"{prompt.row.id}: the engine read {len(output.prompt_token_ids or ())} tokens, the trainer's prompt has"
            f" {len(prompt.token_ids)}: they scale images differently; set vision.min_pixels and vision.max_pixels"
        )


def _request(prompt: Prompt) -> TokensPrompt:
    request: TokensPrompt = {"prompt_token_ids": prompt.engine_token_ids}
    if prompt.vision and "image_embeds" in prompt.vision:
        request["multi_modal_data"] = {"image": dict(prompt.vision)}
    elif prompt.row.images:
        request["multi_modal_data"] = {"image": list(prompt.row.images)}
    return request
