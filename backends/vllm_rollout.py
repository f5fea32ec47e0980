"""vLLM in this process: one request a prompt, and weight updates that prove what arrived."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from rlcore.backend import Backend
from rlcore.config import LoraConfig, RolloutConfig, nearest
from rlcore.errors import ConfigError, PluginError, RunError
from rlcore.protocols import Adapter, NamedTensors
from rlcore.pulse import unwatched
from rlcore.residence import Parked, awake, holding
from rlcore.rollout import folded
from rlcore.types import Group, Prompt, Receipt, Sample, Sampling
from rlcore.weight_sync import Constants, compare, fingerprint, holds_weights

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

_IMAGES_A_PROMPT = 16
_LEAST_TEMPERATURE = 0.01  # vLLM's SamplingParams replace a lower one by it
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a dense product, relative


def build(
    adapter: Adapter,
    folder: Path,
    backend: Backend,
    config: RolloutConfig,
    dtype: torch.dtype,
    max_tokens: int,
    seed: int,
    lora: LoraConfig | None = None,
    beat: Callable[[], None] = unwatched,
    image_embeds: bool = False,
    temperatures: Mapping[str, float] | None = None,
) -> VllmRollout:
    """An engine that serves `folder`. `config.options` are vLLM's own engine arguments and win over ours."""
    if importlib.util.find_spec("vllm") is None:
        raise PluginError(
            f"rollout.engine: vllm is not installed; pip install -r {backend.environment_requirements}"
            " or set rollout.engine=torch"
        )
    defaults = _engine_arguments(folder, dtype, max_tokens, seed, image_embeds) | dict(backend.engine_options("vllm"))
    if distributed.is_initialized():
        defaults |= _one_of_many(config.tensor_parallel)
    _refuse_raised(temperatures or {})
    _refuse_unknown(config.options)
    if lora:
        from . import vllm_additions

        defaults |= vllm_additions.engine_arguments(lora)
    with _undisturbed_random_state():
        from vllm import LLM

        _register_class(folder)
        _collect_earlier()
        try:
            llm = LLM(**(defaults | config.options))
        except ValueError as error:
            raise ConfigError(f"rollout.engine: vLLM refuses to start: {error}") from error
        if config.tensor_parallel > 1:
            _unname_shared_memory()
        _check_heads(_runner(llm).get_model())
        level = _sleep_level(llm, backend)
        if lora:
            return vllm_additions.VllmAdditionsRollout(llm, adapter, beat, level, dtype, lora)
        return VllmWeightsRollout(llm, adapter, beat, level, dtype, _shapes(folder))


class VllmRollout:
    """Serves one model. Log-probabilities are of the distribution drawn from: after temperature, top_p and top_k.

    With temperature alone they equal the trainer's log_softmax(logits / temperature); top_p and top_k renormalise over what is
    left, which the trainer does not do.
    """

    def __init__(self, llm: LLM, adapter: Adapter, beat: Callable[[], None], sleep_level: int) -> None:
        """`sleep_level`: vLLM's; 0 where its sleep mode is off."""
        self._llm, self._beat = llm, beat
        self._adapter = adapter
        self._runner = _runner(llm)
        self.version: int | None = 0
        self._request: LoRARequest | None = None  # the additions that samples are drawn with
        self._level = sleep_level
        self._asleep, self._cached = False, True
        self._cache = Parked(lambda: _cache_of(self._runner), keep=False)
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


class VllmWeightsRollout(VllmRollout):
    """Takes whole weights, and proves that it holds them."""

    def __init__(
        self, llm: LLM, adapter: Adapter, beat: Callable[[], None], sleep_level: int, dtype: torch.dtype,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:  # fmt: skip
        super().__init__(llm, adapter, beat, sleep_level)
        self._ledger = _Ledger(self._runner.get_model(), dtype, shapes)

    def load_weights(self, weights: NamedTensors, version: int) -> Receipt:
        """RunError names the tensors that are missing, unknown or not what was sent."""
        awake(self._asleep, "a weight update")
        started = time.perf_counter()
        self._constants.note()
        checking = time.perf_counter() - started
        shipment = self._ledger.shipment(version)
        self.version = None  # until what arrived has been proved
        try:
            with self._updating():
                self._runner.reload_weights(weights_iterator=shipment.watch(weights))
        except Exception as error:
            self._leave_reload()
            if isinstance(error, RunError):
                raise
            last = shipment.last or "the first tensor"
            raise RunError(f"weight sync: the engine refused version {version} at {last}: {error!r}") from error
        self._ledger.serve_tied_heads()
        self._forget()
        began = time.perf_counter()
        shipment.verify()
        self._check_update(version)
        self.version = version
        done = time.perf_counter()
        checking += shipment.seconds + done - began
        return Receipt(version, shipment.tensors, shipment.bytes, done - started, checking)

    def _packed_bytes(self) -> int:
        return self._ledger.packed_bytes()

    def _leave_reload(self) -> None:
        """Out of a half-done update, so that a whole one can follow."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with contextlib.suppress(Exception), self._updating():
            finalize_layerwise_reload(self._runner.get_model(), self._runner.model_config)

    @contextlib.contextmanager
    def _updating(self) -> Iterator[None]:
        """As vLLM's own worker does it: layers ask for the engine's configuration while they take weights."""
        from vllm.config import set_current_vllm_config

        with torch.no_grad(), set_current_vllm_config(self._llm.llm_engine.vllm_config):
            yield


def _sleep_level(llm: LLM, backend: Backend) -> int:
    """What the backend's options say, where they do, unless rollout.options has turned vLLM's sleep mode on or off."""
    level = getattr(backend.options, "sleep_level", 0)
    return (level or 1) if llm.llm_engine.vllm_config.model_config.enable_sleep_mode else 0


def _runner(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def _derives(holder: Any) -> bool:
    """Whether tensors that this layer or object holds may change with an update: vLLM has layers rearrange their weights after
    loading, and what serves additions is written by an update of those."""
    if "lora" in type(holder).__module__.split("."):
        return True
    rearranges = isinstance(holder, nn.Module) and hasattr(holder, "process_weights_after_loading")
    return holds_weights(holder) or (rearranges and next(holder.parameters(), None) is not None)


def _cache_of(runner: Any) -> Iterator[Tensor]:
    """Tensors of the key-value cache."""
    for cache in runner.kv_caches:
        yield from cache if isinstance(cache, list | tuple) else [cache]


def _request(prompt: Prompt) -> dict[str, Any]:
    request: dict[str, Any] = {"prompt_token_ids": prompt.engine_token_ids}
    if prompt.vision and "image_embeds" in prompt.vision:
        request["multi_modal_data"] = {"image": dict(prompt.vision)}
    elif prompt.row.images:
        request["multi_modal_data"] = {"image": list(prompt.row.images)}
    return request


def _engine_arguments(folder: Path, dtype: torch.dtype, max_tokens: int, seed: int, image_embeds: bool) -> dict[str, Any]:
    arguments = {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_tokens,
        "seed": seed,
        "enforce_eager": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",  # not the folder's: every sampling setting is ours
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        arguments["limit_mm_per_prompt"] = {"image": _IMAGES_A_PROMPT, "video": 0}
        arguments["enable_mm_embeds"] = image_embeds
    return arguments


def _one_of_many(tensor_parallel: int) -> dict[str, Any]:
    """Arguments of an engine in one of several processes that have met: vLLM reads torchrun's variables there. Each process
    sees one device."""
    ranks = {"RANK": distributed.get_rank(), "WORLD_SIZE": distributed.get_world_size(), "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    return {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": tensor_parallel}


def _collect_earlier() -> None:
    """Ends this process's earlier engine now, if nobody holds it: vLLM tears down the process's groups when an engine is
    collected, and later they would be those of the one that follows."""
    gc.collect()


def _unname_shared_memory() -> None:
    """Takes the name from the memory that vLLM's tensor-parallel processes share on processors with AVX-512, once all have it.

    Why: the name is the same in every run of processes that have met by themselves, and vLLM wants a new one: what a killed run
        leaves behind keeps every later engine of this machine from starting ("create shm in SHMManager failed. errno: 17").
    Delete when: vLLM's cpu_worker.py makes VLLM_DIST_IDENT of more than `env://`.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    module = getattr(group.device_communicator, "dist_module", None)
    if name := getattr(module, "group_name", None):
        Path("/dev/shm", f"{name.lstrip('/')}_{group.rank_in_group}").unlink(missing_ok=True)


def _register_class(folder: Path) -> None:
    """Has vLLM look at the model's class in this process.

    Otherwise it starts one of its own to do so, which takes some ten seconds and dies where torchvision needs its cure.
    """
    from vllm import ModelRegistry

    for architecture in json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def _check_heads(model: nn.Module) -> None:
    """ConfigError for attention heads that vLLM starts with and then fails to compute."""
    for layer in model.modules():
        kind = getattr(layer, "attn_backend", None)  # a vision tower's is only a name: the engine's kernels are not for it
        if isinstance(kind, type) and not kind.supports_head_size(size := layer.head_size):
            known = ", ".join(map(str, kind.get_supported_head_sizes()))
            raise ConfigError(
                f"rollout.engine: vLLM's {kind.get_name()} has no kernel for this model's attention heads of {size} (it has"
                f" {known}); set rollout.engine=torch"
            )


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Of every tensor in the folder, from the headers of its files."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


def _refuse_raised(temperatures: Mapping[str, float]) -> None:
    """A temperature that vLLM would replace by a higher one, of which the trainer's log-probabilities know nothing."""
    for key, temperature in temperatures.items():
        if 0 < temperature < _LEAST_TEMPERATURE:
            raise ConfigError(
                f"{key}: {temperature} is below {_LEAST_TEMPERATURE}, at which vLLM would sample instead; raise it to that, or"
                " set rollout.engine=torch"
            )


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    from vllm import EngineArgs

    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in options:
        if name not in known:
            hint = nearest(name, known)
            hint = hint if "did you mean" in hint else "; vLLM's engine arguments are what may stand here"
            raise ConfigError(f"rollout.options.{name}: vLLM has no such engine argument{hint}")


@contextlib.contextmanager
def _undisturbed_random_state() -> Iterator[None]:
    """vLLM seeds every generator of the process; the trainer's draws must not depend on that."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@dataclass(frozen=True, eq=False)
class _Product:
    """What a packed matrix [N, K] does, where its numbers can no longer be read.

    On the CPU vLLM keeps linear layers in oneDNN's own layout and drops the original.
    """

    dense: Tensor  # [N] times a random vector: every element counts, to rounding
    column: Tensor  # [N] times a unit vector: one column, a different one for each version, to the bit

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Product) or self.dense.shape != other.dense.shape:
            return False
        distance, size = (self.dense.float() - other.dense.float()).norm(), self.dense.float().norm()
        return torch.equal(self.column, other.column) and bool(distance <= _TOLERANCE[self.dense.dtype] * size)


@dataclass(frozen=True)
class _Place:
    """Where the engine keeps a tensor: part `index` of the rows of `parameter` of a layer."""

    layer: str
    parameter: str
    index: int


def locate(model: nn.Module, name: str, has: Callable[[str], bool]) -> _Place:
    """Of a tensor under its Hugging Face name; `has` says which layers there are."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if hasattr(mapper, "get_rename_mapper"):  # vLLM 0.23 has none: nothing but names is in its mapper
        mapper = mapper.get_rename_mapper()
    mapped = next(iter(mapper.apply_list([name]) if mapper else ()), name)
    layer, _, parameter = mapped.rpartition(".")
    parent, _, leaf = layer.rpartition(".")
    for fused, parts in _fused(model).items():
        if leaf in parts and has(f"{parent}.{fused}"):
            return _Place(f"{parent}.{fused}", parameter, parts.index(leaf))
    return _Place(layer, parameter, 0)


def _fused(model: nn.Module) -> dict[str, list[str]]:
    """Layers that the engine computes as one, and what they are made of."""
    return {fused: parts for fused, parts in getattr(model, "packed_modules_mapping", {}).items() if len(parts) > 1}


class _Ledger:
    """Which tensors the engine needs, and how each can be read back. Names come from the served model itself."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, shapes: Mapping[str, Sequence[int]]) -> None:
        self.model = model
        self.dtype = dtype
        self.device = next(model.parameters()).device
        self._fused = _fused(model)
        self.packed = {name for name, layer in model.named_modules() if _is_packed(layer)}
        self.heads = {name for name, layer in model.named_modules() if _is_head(layer)}
        self.needed = {place for name, _ in model.named_parameters() for place in self._places_of(name)}
        self.tied = self._tied_heads()
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._shapes = {self.place(name): list(shape) for name, shape in shapes.items()}

    def place(self, name: str) -> _Place:
        """Of a tensor under its Hugging Face name."""
        return locate(self.model, name, self._has)

    def admit(self, name: str, tensor: Tensor) -> _Place:
        """The tensor's place, or RunError before the engine sees it."""
        place = self.place(name)
        if place not in self.needed and place.layer not in self.tied:
            raise RunError(f"weight sync: unexpected tensor {name}: the engine has no such weight; is this the served model?")
        shape = self._shapes.get(place, list(tensor.shape))
        if list(tensor.shape) != shape:
            raise RunError(f"weight sync: {name} was sent as {list(tensor.shape)}, the engine holds {shape}")
        return place

    def part(self, place: _Place, tensor: Tensor) -> Tensor:
        """What this rank of a tensor-parallel engine holds of it."""
        layer = self.model.get_submodule(place.layer)
        if getattr(layer, "tp_size", 1) == 1:
            return tensor
        sizes = getattr(layer, "output_sizes", None)
        if sizes and place.index == 0 and len(tensor) == sum(sizes) and len(sizes) > 1:  # fused in the checkpoint already
            return torch.cat([_rows_of(layer, index, one) for index, one in enumerate(tensor.split(sizes))])
        return _rows_of(layer, place.index, tensor)

    def as_held(self, place: _Place, tensor: Tensor) -> Tensor:
        """In the numbers it is served in. A processor with AMX has biases of a bfloat16 model in float32."""
        return tensor.to(self._dtypes.get(f"{place.layer}.{place.parameter}", self.dtype))

    def title(self, place: _Place) -> str:
        """The tensor's name in the engine, with fused layers taken apart."""
        parent, _, leaf = place.layer.rpartition(".")
        parts = self._fused.get(leaf)
        return f"{parent}.{parts[place.index]}.{place.parameter}" if parts else f"{place.layer}.{place.parameter}"

    def shipment(self, version: int) -> _Shipment:
        return _Shipment(self, version)

    def product(self, layer: str, version: int) -> _Product:
        """[all rows of the layer]."""
        module = self.model.get_submodule(layer)
        probe = _probe(_width(module), version, self.dtype).to(self.device)
        dense, column = module.quant_method.apply(module, probe, None)
        return _Product(dense, column)

    def heads_fed_by(self, place: _Place) -> list[str]:
        """The output heads that multiply by this tensor: their own weight, or the embedding they are tied to."""
        return [head for head in self.heads if place.parameter == "weight" and place.layer in (head, self.tied.get(head))]

    def packed_bytes(self) -> int:
        """Of the layers whose numbers can no longer be read."""
        layers = (self.model.get_submodule(name) for name in self.packed)
        return sum(layer.output_size_per_partition * _width(layer) for layer in layers) * self.dtype.itemsize

    def serve_tied_heads(self) -> None:
        """vLLM's reload packs the layers that it was sent weights for, and a tied head is sent none: on the CPU it would go on
        multiplying by the embedding of before. It is given what the embedding has been packed to."""
        for head, embedding in self.tied.items():
            owner = self.model.get_submodule(embedding)
            if hasattr(owner, "cpu_linear"):
                self.model.get_submodule(head).cpu_linear = owner.cpu_linear

    def parameter(self, layer: str, name: str) -> Tensor | None:
        return getattr(self.model.get_submodule(layer), name, None) if self._has(layer) else None

    def _has(self, layer: str) -> bool:
        try:
            self.model.get_submodule(layer)
        except AttributeError:
            return False
        return True

    def _places_of(self, name: str) -> list[_Place]:
        layer, _, parameter = name.rpartition(".")
        return [_Place(layer, parameter, index) for index in range(len(self._fused.get(layer.rpartition(".")[2], [0])))]

    def _tied_heads(self) -> dict[str, str]:
        """Head layer -> the embedding layer it shares its weight with."""
        owners: dict[int, str] = {}
        for name, layer in self.model.named_modules():
            if isinstance(getattr(layer, "weight", None), Tensor) and name not in self.heads:
                owners.setdefault(id(layer.weight), name)
        modules = {name: self.model.get_submodule(name) for name in self.heads}
        return {name: owners[id(layer.weight)] for name, layer in modules.items() if id(layer.weight) in owners}


class _Shipment:
    """One weight update: what was sent, noted as it streams by, against what the engine holds afterwards."""

    def __init__(self, ledger: _Ledger, version: int) -> None:
        self._ledger = ledger
        self._version = version
        self._parts: dict[tuple[str, str], dict[int, tuple[str, torch.Size]]] = defaultdict(dict)
        self._sent: dict[str, Any] = {}
        self._names: dict[_Place, str] = {}
        self.last = ""
        self.tensors = self.bytes = 0
        self.seconds = 0.0

    def watch(self, weights: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            started = time.perf_counter()
            self._note(name, tensor.detach())
            self.seconds += time.perf_counter() - started
            yield name, tensor.detach()

    def verify(self) -> None:
        with torch.inference_mode():
            held = self._held()
        compare(self._sent, held)

    def _note(self, name: str, tensor: Tensor) -> None:
        ledger, place = self._ledger, self._ledger.admit(name, tensor)
        self.last = name
        self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
        tensor = ledger.part(place, tensor).to(ledger.dtype)
        self._names[place] = name
        self._parts[place.layer, place.parameter][place.index] = (name, tensor.shape)
        packed = place.layer in ledger.packed and place.parameter == "weight"
        self._sent[name] = _product(tensor, self._version) if packed else fingerprint(ledger.as_held(place, tensor))
        for head in ledger.heads_fed_by(place):
            self._sent[_served(head)] = _product(tensor, self._version)

    def _held(self) -> dict[str, Any]:
        """By Hugging Face name; by the engine's where nobody sent it."""
        ledger = self._ledger
        missing = [place for place in ledger.needed if place not in self._names]
        incomplete = {(place.layer, place.parameter) for place in missing}
        held: dict[str, Any] = {ledger.title(place): None for place in missing}
        for (layer, parameter), parts in self._parts.items():
            if (layer, parameter) in incomplete:
                held |= {name: self._sent[name] for name, _ in parts.values()}  # where the others begin is unknown
            else:
                held |= self._parts_held(layer, parameter, [parts[index] for index in sorted(parts)])
        return held | {_served(head): self._head_held(head) for head in ledger.heads}

    def _parts_held(self, layer: str, parameter: str, parts: list[tuple[str, torch.Size]]) -> dict[str, Any]:
        packed = layer in self._ledger.packed and parameter == "weight"
        whole = self._ledger.product(layer, self._version) if packed else self._ledger.parameter(layer, parameter)
        if whole is None:
            return {}
        held, start = {}, 0
        for name, shape in parts:
            rows = slice(start, start + shape[0])
            start = rows.stop
            held[name] = _Product(whole.dense[rows], whole.column[rows]) if packed else _fingerprint_as(whole[rows], shape)
        return held

    def _head_held(self, head: str) -> _Product:
        product = self._ledger.product(head, self._version)
        sent = self._sent.get(_served(head))
        rows = slice(0, len(sent.dense) if sent else None)  # the engine pads the vocabulary
        return _Product(product.dense[rows], product.column[rows])


def _rows_of(layer: Any, index: int, tensor: Tensor) -> Tensor:
    """This rank's rows (or columns, of a layer that takes a part of the input) of part `index` of a layer."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(layer, VocabParallelEmbedding):
        return tensor[layer.shard_indices.org_vocab_start_index : layer.shard_indices.org_vocab_end_index]
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear) and index > 0:  # few key and value heads are held by several ranks
        rank, size = rank // layer.num_kv_head_replicas, size // layer.num_kv_head_replicas
    if isinstance(layer, ColumnParallelLinear):
        return tensor.chunk(size)[rank]
    return tensor.chunk(size, dim=1)[rank] if isinstance(layer, RowParallelLinear) and tensor.dim() > 1 else tensor


def _product(tensor: Tensor, version: int) -> _Product:
    """What a packed layer with the weight [N, K] is expected to do."""
    column = version % tensor.shape[1]
    return _Product(tensor.mv(_noise(tensor.shape[1]).to(tensor)), tensor[:, column].clone())


def _probe(width: int, version: int, dtype: torch.dtype) -> Tensor:
    """[2, width]: a random row, and the unit row of the column that this version checks to the bit."""
    probe = torch.zeros(2, width, dtype=dtype)
    probe[0] = _noise(width)
    probe[1, version % width] = 1
    return probe


@lru_cache
def _noise(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


def _fingerprint_as(tensor: Tensor, shape: torch.Size) -> Any:
    """Of the tensor in the shape it was sent in; its own where that does not fit."""
    return fingerprint(tensor.reshape(shape) if tensor.numel() == shape.numel() else tensor)


def _served(head: str) -> str:
    return f"{head} (as served)"


def _is_packed(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "quant_method") and isinstance(weight, Tensor) and weight.numel() == 0


def _is_head(layer: nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, ParallelLMHead)


def _width(layer: nn.Module) -> int:
    """K of a layer [N, K]."""
    return layer.embedding_dim if _is_head(layer) else getattr(layer, "input_size_per_partition", layer.input_size)
