"""Prompts, samples, optimizer steps and micro-batches of a run, before it starts."""

from __future__ import annotations

from collections.abc import Mapping

from rlcore.config.schema import RunConfig
from rlcore.config.sections import ONLY, SftConfig
from rlcore.data.prompts import Encoded, PromptSource
from rlcore.data.sources import held_out_prompts, training_prompts
from rlcore.device import Backend
from rlcore.model.loading import family_of, resolve
from rlcore.model.packing import plan_microbatches
from rlcore.model.resolved import MODEL_CACHE
from rlcore.train.sft import steps
from rlcore.types import Prompt

CAP = "train.max_tokens_per_microbatch"


def read(config: RunConfig, backend: Backend) -> tuple[PromptSource, dict[str, Encoded[Prompt]]]:
    """The training rows and the evaluation rows. Needs the model's configuration and tokenizer, not its weights."""
    family = family_of(resolve(config.model, MODEL_CACHE, weights=False), config.model, config.vision)
    family.use_template(config.data.chat_template, config.data.chat_template_options)
    held_out = held_out_prompts(config.data, family) if config.evaluation else {}
    return training_prompts(config.data, family, config.seed), held_out


def device_bytes(backend: Backend, given: float | None, absent: str | None) -> int | None:
    """Memory of a device: `given` in GiB, or that of the one that is here and has its own."""
    if given is not None:
        return int(given * 2**30)
    memory = backend.free_memory() if backend.own_memory and absent is None else None
    return memory[1] if memory else None


def some(training: PromptSource, count: int = 16) -> list[Prompt]:
    """The first prompts of the run, for the sizes of its images."""
    try:
        return training.draw(min(count, len(training))) if training.sets else []
    finally:
        training.close()


def describe(config: RunConfig, training: PromptSource, held_out: Mapping[str, Encoded[Prompt]]) -> str:
    """Prompts, samples, optimizer steps and micro-batches, each with the arithmetic behind it."""
    train, group = config.train, config.algorithm.group_size
    passes = train.steps * train.prompts_per_step / len(training)
    prompts = train.prompts_per_step
    longest_prompt, longest_response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    share = prompts // train.minibatches_per_step
    ranks = _data_ranks(config)
    full = [(longest_prompt, [longest_response] * group)] * -(-share // ranks)
    cap = train.max_tokens_per_microbatch
    most = len(plan_microbatches(full, cap))
    longest = longest_prompt + longest_response
    lines = [
        ("training rows", _rows(training)),
        ("prompts a step", f"{prompts} (train.prompts_per_step)"),
        ("samples a step", f"{prompts * group} = {prompts} prompts x {group} (algorithm.group_size)"),
        ("optimizer steps a step", _optimizer_steps(config) + f", {share * group} samples each"),
        ("micro-batches an optimizer step", f"at most {most}{_each(ranks)}, none above {cap} tokens ({CAP})"),
        ("longest sample", f"{longest} tokens = {longest_prompt} prompt + {longest_response} response"),
        ("steps", f"{train.steps} (train.steps)"),
        ("prompts in all", f"{train.steps * prompts} = {passes:.2f} passes over the training rows"),
        ("samples in all", f"{train.steps * prompts * group}"),
        ("optimizer steps in all", f"{train.steps * train.epochs_per_step * train.minibatches_per_step}"),
    ]  # fmt: skip
    if config.placement.kind != "local":
        lines.append(("devices", _devices(config)))
    if config.sft:
        lines.insert(0, ("warm start", _supervised(config.sft, training)))
    if config.evaluation:
        lines.append(("evaluation", _evaluations(config)))
    lines += [("evaluation rows" if name == ONLY else f"evaluation rows {name}", _rows(one)) for name, one in held_out.items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _supervised(config: SftConfig, training: PromptSource) -> str:
    count, rows = steps(config, training), config.rows_per_step
    whole = count * rows if config.epochs is None else min(count * rows, config.epochs * len(training))
    passes = f"{whole / len(training):.2f} passes over the training rows"
    return f"{count} supervised steps x {rows} rows = {whole}, {passes}"


def _rows(prompts: PromptSource | Encoded[Prompt]) -> str:
    dropped = f" ({prompts.dropped_long} more are longer than data.max_prompt_tokens and dropped)"
    return f"{len(prompts)}{dropped if prompts.dropped_long else ''}"


def _optimizer_steps(config: RunConfig) -> str:
    minibatches, epochs = config.train.minibatches_per_step, config.train.epochs_per_step
    if epochs == 1:
        return f"{minibatches} (train.minibatches_per_step)"
    return f"{epochs * minibatches} = {epochs} passes (train.epochs_per_step) x {minibatches} (train.minibatches_per_step)"


def _data_ranks(config: RunConfig) -> int:
    """Data-parallel ranks: the actor's devices divided by sequence_parallel."""
    return config.topology.of("actor").devices // config.sharding.sequence_parallel


def _each(ranks: int) -> str:
    return f" on each of {ranks} ranks" if ranks > 1 else ""


def _devices(config: RunConfig) -> str:
    idle = {"reference"} if not config.algorithm.kl_coef and not config.dpo else set()
    idle |= set() if config.model.images_are_read_once else {"vision"}
    parts = [f"{pool.devices} for {', '.join(sorted(pool.roles - idle))}" for pool in config.topology.pools]
    return f"{config.topology.devices} = {' + '.join(parts)} ({config.placement.kind})"


def _evaluations(config: RunConfig) -> str:
    settings = config.evaluation
    assert settings is not None
    moments = ["before training"] * settings.before + [f"every {settings.every} steps"] * bool(settings.every)
    moments += ["at the end"] * settings.at_end
    return f"{', '.join(moments)}: {settings.samples} response(s) a row, temperature {settings.temperature}"
