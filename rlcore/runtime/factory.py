"""Builds the rollout engine of a worker."""

from __future__ import annotations

from collections.abc import Callable

from rlcore import registry
from rlcore.errors import ConfigError
from rlcore.model.loading import context_length
from rlcore.model.resolved import ResolvedModel
from rlcore.protocols import Rollout


def start_rollout(resolved: ResolvedModel, beat: Callable[[], None]) -> Rollout:
    """Start the engine that the run file or the backend chooses; it gets its weights by `load_weights`."""
    config, backend = resolved.config, resolved.backend
    name = backend.default_engine if config.rollout.engine == "auto" else config.rollout.engine
    sampling = {"rollout": config.rollout} | ({"evaluation": config.evaluation} if config.evaluation else {})
    response = max(settings.max_new_tokens for settings in sampling.values())
    longest, context = config.data.max_prompt_tokens + response, context_length(resolved.folder)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_prompt_tokens: {config.data.max_prompt_tokens} and {response} new tokens are {longest}, more than the"
            f" {context} positions of {config.model.path}; lower it to {context - response} or less, or max_new_tokens"
        )
    build = registry.load("rollout_engines", name)
    return build(
        family=resolved.family, folder=resolved.folder, backend=backend, config=config.rollout,
        dtype=resolved.settings.compute_dtype, max_tokens=longest, seed=config.seed, lora=resolved.additions, beat=beat,
        image_embeds=config.model.images_are_read_once,
        temperatures={f"{section}.temperature": settings.temperature for section, settings in sampling.items()},
    )
