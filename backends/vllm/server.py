"""vLLM as HTTP servers: paths and fields of vLLM's API, and how its servers are started. Nothing here imports vLLM."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch

from rlcore.config.loader import validate
from rlcore.config.sections import LoraConfig, RolloutConfig
from rlcore.device import Backend
from rlcore.distributed.broadcast import WeightBroadcast
from rlcore.errors import ConfigError, PluginError, RunError
from rlcore.monitor.heartbeat import no_heartbeat
from rlcore.protocols import ModelFamily
from rlcore.types import NamedTensors, Prompt, Sampling

from ..common import node_address, rendezvous
from ..server.api import Answer, Completion, Limits, Sent
from ..server.client import Server, WrongAnswer
from ..server.fleet import Fleet
from ..server.rollout import ServerRollout
from ..server.start import ServerOptions, fleet
from .embeddings import ImageFeatures
from .engine import common_arguments, file_shapes, image_arguments, refuse_experts, refuse_raised
from .plugin import SERVED_BY, TRANSFER

if TYPE_CHECKING:
    from PIL.Image import Image

_BUCKET = 64 * 2**20  # bytes of weights in a broadcast
_NEEDED = {
    "enable_scale_out": True,  # /inference/v1/generate: token ids in and out
    "worker_extension_cls": "rlcore_backends.vllm.extension.Extension",
    "weight_transfer_config": {"backend": TRANSFER},
}
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # endpoints of weight updates
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # ours turns it off, for the engine in this process
}
_GRACE = 5.0  # seconds in which servers report why a broadcast failed
_SHAPING = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings", "num_experts", "moe_intermediate_size", "depth", "out_hidden_size",
}  # fmt: skip
_IN_CORE = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""The worker in the engine's process. By default it has one of its own on CPUs, to bind its threads; ours are not bound."""
_INITIAL = "default"  # vLLM's label of the weights it started with


def build(
    family: ModelFamily,
    folder: Path,
    backend: Backend,
    config: RolloutConfig,
    dtype: torch.dtype,
    max_tokens: int,
    seed: int,
    lora: LoraConfig | None = None,
    beat: Callable[[], None] = no_heartbeat,
    image_embeds: bool = False,
    temperatures: Mapping[str, float] | None = None,
    experts: bool = False,
) -> ServerRollout:
    """Start servers of `folder`, or use those at `rollout.options.addresses`."""
    options: ServerOptions = validate(ServerOptions, config.options, "rollout.options.")
    refuse_raised(temperatures or {})
    refuse_experts(experts)
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel: {config.tensor_parallel} workers would share an engine, and each has its servers; set"
            f" it to 1 and rollout.options.arguments.tensor_parallel_size to {config.tensor_parallel}"
        )
    if lora:
        raise ConfigError("model.lora.sync: adapter is for an engine in the worker's process; set it to merged")
    if not options.addresses and importlib.util.find_spec("vllm") is None:
        raise PluginError(
            f"rollout.engine: vllm is not installed; pip install -r {backend.environment_requirements}, or name running servers"
            " in rollout.options.addresses"
        )
    arguments = {
        **common_arguments(folder, dtype, max_tokens, seed),
        **backend.engine_options("vllm"),
        **image_arguments(folder, family.image_options, image_embeds), **options.arguments, **_NEEDED,
    }  # fmt: skip
    if arguments.get("tensor_parallel_size", 1) == 1:
        arguments.setdefault("distributed_executor_backend", _IN_CORE)
    del arguments["disable_log_stats"]  # they count the tokens by which a stall is seen
    chosen = {"backend": backend.name, "options": backend.options.model_dump(mode="json"), "model": str(folder)}
    environment = {**backend.environment(), **backend.given, **_ENVIRONMENT, SERVED_BY: json.dumps(chosen)}
    servers = fleet(options, lambda host, port: _command(host, port, arguments), environment, beat)
    return ServerRollout(servers, VllmApi(folder, family, dtype, max_tokens, image_embeds, options.stall_seconds), family)


class VllmApi:
    """vLLM 0.32's API with VLLM_SERVER_DEV_MODE=1, --enable-scale-out, and our worker extension and weight transfer."""

    def __init__(
        self, folder: Path, family: ModelFamily, dtype: torch.dtype, max_tokens: int, image_embeds: bool, seconds: float
    ) -> None:
        self._folder, self._family, self._dtype = folder, family, dtype
        self._max_tokens, self._image_embeds, self._seconds = max_tokens, image_embeds, seconds
        self._shapes = file_shapes(folder)
        self._features = ImageFeatures(folder) if image_embeds else None
        self._connected: list[Server] = []
        self._broadcast: WeightBroadcast | None = None
        self._workers: dict[Server, int] = {}

    async def examine(self, server: Server) -> Limits:
        try:
            report = (await self._call(server, "rlcore_report"))[0]
        except WrongAnswer as error:
            raise ConfigError(f"rollout.engine: {error}; start it as docs/backends.md says") from None
        except RunError as error:
            raise ConfigError(f"rollout.engine: {error}") from None
        if fault := "; ".join(self._misfits(report)):
            raise ConfigError(f"rollout.engine: {server}: {fault}")
        self._workers[server] = report["workers"]
        held = await self.resume(server)  # a run before this one may have left it paused
        return Limits(report["vocabulary"], report["max_num_seqs"], held)

    def request(self, prompt: Prompt, sampling: Sampling, seed: int) -> tuple[str, Any]:
        parameters = {
            "n": sampling.samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "logprobs": 0,  # the drawn token's only
            "stop_token_ids": sorted(self._family.stop_token_ids),
            "ignore_eos": True,  # only the family's stop tokens end a turn
            "detokenize": False,
        }
        body = {"token_ids": prompt.engine_token_ids, "sampling_params": parameters, "return_token_ids": True}
        if self._features and prompt.vision:
            body |= {"token_ids": prompt.token_ids, "features": self._features(prompt.token_ids, prompt.vision)}
        elif prompt.row.images:
            body["content_parts"] = [{"type": "image_url", "url": _png(image)} for image in prompt.row.images]
        return "/inference/v1/generate", body

    def read(self, answer: Any) -> Answer:
        return Answer(answer["prompt_token_ids"], [_completion(choice) for choice in answer["choices"]])

    async def progress(self, server: Server) -> float:
        """Tokens read and written by the engine, from its metrics."""
        lines = (await server.get("/metrics")).splitlines()
        counters = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(counters))

    async def forget(self, server: Server) -> None:
        await server.post("/reset_prefix_cache")
        await server.post("/reset_encoder_cache")

    async def pause(self, server: Server) -> int:
        await server.post("/pause", mode="wait")
        return (await self._call(server, "rlcore_free_cache"))[0]["bytes"]

    async def resume(self, server: Server) -> int:
        held = (await self._call(server, "rlcore_restore_cache"))[0]["bytes"]
        await server.post("/resume")
        return held

    def send(self, fleet: Fleet, weights: NamedTensors, version: int) -> Sent:
        """Broadcast the weights to all workers of all servers at once; each verifies what its engine holds."""
        fleet.each(lambda server: server.post("/pause", mode="wait"))
        fleet.each(lambda server: self._call(server, "rlcore_announce", version=version, shapes=self._shapes))
        fleet.each(_start)
        broadcast, counted = self._meet(fleet), _Counted(weights)
        receiving = {
            server: fleet.loop.start(server.post("/update_weights", {"update_info": {}}, limited=False))
            for server in fleet.servers
        }
        try:
            broadcast.send(counted)
        except RuntimeError as error:
            raise _broken(receiving, error) from error
        faults = [answer.exception() for answer in receiving.values()]
        if fault := next(filter(None, faults), None):
            raise fault
        fleet.each(lambda server: server.post("/finish_weight_update", {"weight_version": str(version)}))
        receipts = fleet.each(lambda server: self._call(server, "rlcore_receipt", version=version))
        fleet.each(self.forget)
        fleet.each(lambda server: server.post("/resume"))
        for server, receipt in ((server, receipt) for server, found in receipts.items() for receipt in found):
            if (receipt["tensors"], receipt["bytes"]) != (counted.tensors, counted.bytes):
                raise RunError(
                    f"weight sync: {server} received {receipt['tensors']} tensors of {receipt['bytes']} bytes, sent were"
                    f" {counted.tensors} of {counted.bytes}"
                )
        slowest = max(receipt["check_seconds"] for found in receipts.values() for receipt in found)
        return Sent(counted.tensors, counted.bytes, slowest)

    def _meet(self, fleet: Fleet) -> WeightBroadcast:
        """The broadcast to all workers; they meet anew when the servers are not those of the last update."""
        if self._broadcast is None or self._connected != fleet.servers:
            self._broadcast, self._connected = None, list(fleet.servers)
            host = _reachable(self._connected[0].address)
            address, size = node_address.free_endpoint(host), 1 + sum(self._workers[one] for one in self._connected)
            coming, first = dict[Server, Future[Any]](), 1
            for server in self._connected:
                meeting = {"address": address, "first_rank": first, "size": size, "seconds": self._seconds}
                coming[server] = fleet.loop.start(server.post("/init_weight_transfer_engine", {"init_info": meeting}))
                first += self._workers[server]
            try:
                group = rendezvous.host_group(address, host, 0, size, self._seconds)
            except RuntimeError as error:
                raise _broken(coming, error) from error
            self._broadcast = WeightBroadcast(group, torch.device("cpu"), _BUCKET)
            for answer in coming.values():
                answer.result()
        return self._broadcast

    async def _call(self, server: Server, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """Result of a method of our worker extension, on each worker."""
        results = (await server.post("/collective_rpc", {"method": method, "kwargs": arguments}))["results"]
        for result in results:
            if fault := result.get("fault"):
                raise RunError(f"{server}: {fault}")
        return results

    def _misfits(self, report: Mapping[str, Any]) -> Iterator[str]:
        """What the server's settings and model lack."""
        model = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        yield from _differences(model, report["model"])
        wanted = {"dtype": str(self._dtype).removeprefix("torch."), "logprobs_mode": "processed_logprobs"}
        for name, value in wanted.items():
            if report[name] != value:
                yield f"--{name.replace('_', '-')} is {report[name]}; start it with {value}"
        if report["transfer"] != TRANSFER:
            yield f"""start it with --weight-transfer-config '{{"backend": "{TRANSFER}"}}'"""
        if report["max_model_len"] < self._max_tokens:
            yield f"--max-model-len is {report['max_model_len']}; samples may have {self._max_tokens} tokens"
        if self._features and not report["embeds"]:
            yield "images are embedded by the trainer (model.freeze: [vision]); start it with --enable-mm-embeds"
        images = dict(self._family.image_options)
        if images and (report["images"] or {}).get("images_kwargs") != images:
            wanted = json.dumps({"images_kwargs": images})
            yield f"it scales images differently; start it with --mm-processor-kwargs '{wanted}'"


class _Counted:
    """Counts the tensors and bytes that pass."""

    def __init__(self, weights: NamedTensors) -> None:
        self._weights = weights
        self.tensors = self.bytes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.tensors, self.bytes = self.tensors + 1, self.bytes + tensor.nbytes
            yield name, tensor


async def _start(server: Server) -> None:
    """Begin an update, also where an earlier one was left unfinished: another server refused it, or its trainer was killed."""
    try:
        await server.post("/start_weight_update")
    except WrongAnswer:
        await server.post("/finish_weight_update", {})
        await server.post("/start_weight_update")


def _broken(receiving: Mapping[Server, Future[Any]], error: RuntimeError) -> RunError:
    """The error of a broadcast that failed: who is gone, or else who has not received it."""
    wait(receiving.values(), timeout=_GRACE)
    for server, answer in receiving.items():
        if answer.done() and (fault := answer.exception()):
            return RunError(f"weight sync: {fault}{server.end()}")
    waiting = [str(server) for server, answer in receiving.items() if not answer.done()]
    return RunError(f"weight sync: the broadcast to {', '.join(waiting) or 'the servers'} failed: {error}")


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Numbers of two model configurations that differ."""
    for name, value in ours.items():
        other = theirs.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{where}{name}.")
        elif name in _SHAPING and other is not None and other != value:
            yield f"it serves another model: {where}{name} is {other}, and {value} in the run's model"


def _completion(choice: Mapping[str, Any]) -> Completion:
    logprobs = [step["logprob"] for step in choice["logprobs"]["content"]]
    labels = [span["version"] for span in choice["weight_versions"]]
    return Completion(
        choice["token_ids"], logprobs, choice["finish_reason"], ["0" if label == _INITIAL else label for label in labels]
    )


def _png(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _reachable(address: str) -> str:
    """This node's address as the server at `address` reaches it."""
    host = urlsplit(address).hostname or ""
    return node_address.towards(node_address.resolve(host, "rollout.options.addresses"), "rollout.options.addresses")


def _command(host: str, port: int, arguments: Mapping[str, Any]) -> list[str]:
    flags = {"host": host, "port": port, "uvicorn_log_level": "warning", **arguments}
    serve = [sys.executable, "-m", "rlcore_backends.vllm.serve", str(flags.pop("model"))]
    return [*serve, *(one for flag in flags.items() for one in _flag(*flag))]


def _flag(name: str, value: Any) -> list[str]:
    """An argument as vLLM's command line takes it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
