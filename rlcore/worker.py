"""The roles of one process on one device, and the weights that pass between them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch

from rlcore import registry
from rlcore.algorithms import grpo
from rlcore.config import RunConfig
from rlcore.data import PromptSource, load_rows
from rlcore.errors import ConfigError
from rlcore.models import adapter_for, context_length, resolve
from rlcore.policy import ForwardSettings, Loss, TorchActor, TorchReference
from rlcore.protocols import Backend, Reward, Rollout
from rlcore.types import Batch, Metrics, Receipt

MODEL_CACHE = Path.home() / ".cache" / "rlcore" / "models"
EMULATED = (
    "model.precision bf16: this {} has no bf16 instructions, and emulating them takes a hundred times as long as fp32;"
    " model.precision=auto takes the fast one"
)


class Policy:
    """The model that is trained, and how it is run: what every role on this device is made from."""

    def __init__(self, config: RunConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        backend.prepare()
        self.folder = resolve(config.model, MODEL_CACHE)
        self.adapter = adapter_for(self.folder, config.model)
        fast = backend.default_precision()
        self.precision = precision = fast if config.model.precision == "auto" else config.model.precision
        self.caution = EMULATED.format(backend.name) if precision == "bf16" != fast else None
        self.settings = ForwardSettings(
            device=backend.device(0),
            compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            max_tokens=config.train.max_tokens_per_microbatch,
            temperature=config.rollout.temperature,
        )

    def load(self, folder: Path | None = None) -> torch.nn.Module:
        """The weights of `folder`, or the ones the run starts from, in float32 on the device."""
        return self.adapter.load(folder or self.folder, torch.float32).to(self.settings.device)

    def prompts(self, seed: int) -> PromptSource:
        """The training rows, shuffled by `seed`."""
        data = self.config.data
        return PromptSource(load_rows(data.train), self.adapter, data.max_prompt_tokens, data.long_prompts, seed)


class Worker:
    """Actor, reference, rollout and reward in this process."""

    def __init__(self, policy: Policy, model: torch.nn.Module, rollout: Rollout, reward: Reward) -> None:
        """`model` is the initial policy; the reference stays what it is now."""
        config = policy.config
        loss: Loss = partial(grpo.loss, config=config.algorithm)
        self.actor = TorchActor(
            model, policy.adapter, policy.settings, loss, config.optimizer, config.train.minibatches_per_step
        )
        self.reference: TorchReference | None = None
        if config.algorithm.kl_coef:
            self.reference = TorchReference(copy.deepcopy(model).requires_grad_(False), policy.adapter, policy.settings)
        self.rollout, self.reward = rollout, reward
        self.version = 0
        self.receipt: Receipt | None = None  # of the weights the engine serves

    def sync_weights(self) -> Receipt:
        """Make the engine serve the actor's weights, if it does not already; the receipt of the weights it serves."""
        if self.receipt is None or self.receipt.version != self.version:
            self.receipt = self.rollout.load_weights(self.actor.weights(), self.version)
        return self.receipt

    def update(self, batch: Batch) -> Metrics:
        """All optimizer steps of this batch: a new version of the weights."""
        result = self.actor.update(batch)
        self.version += 1
        return result


def start_rollout(policy: Policy, model: torch.nn.Module) -> Rollout:
    """The engine that the run file or the backend chooses, started; weights reach it by `sync_weights`."""
    config, backend = policy.config, policy.backend
    name = backend.default_engine if config.rollout.engine == "auto" else config.rollout.engine
    sampling = [config.rollout] + ([config.evaluation] if config.evaluation else [])
    response = max(settings.max_new_tokens for settings in sampling)
    longest, context = config.data.max_prompt_tokens + response, context_length(policy.folder)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and {response} new tokens are {longest}, more than the"
            f" {context} positions of {config.model.path}; lower it to {context - response} or less, or max_new_tokens"
        )
    build = registry.load("engines", name)
    return build(
        model=model, adapter=policy.adapter, folder=policy.folder, backend=backend, config=config.rollout,
        dtype=policy.settings.compute_dtype, max_tokens=longest, seed=config.seed,
    )
