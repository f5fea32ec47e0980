"""The value model: its inputs, its training and its metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlcore import registry
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.critic import TorchCritic
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.types import Batch, Group, Row, Sample

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 4096, 1.0)
RESPONSES = [[[10, 11, 12], [20, 30]], [[40, 41, 42, 43], [50]]]


@pytest.fixture(scope="module")
def family(tiny_llama):
    return registry.load("families", "llama")(tiny_llama)


@pytest.fixture(scope="module")
def batch(family):
    prompts = [family.encode(Row(f"row:{n}", [{"role": "user", "content": f"{n} + 4?"}])) for n in range(len(RESPONSES))]
    groups = [
        Group(prompt, [Sample(ids, [-5.0] * len(ids), "", "stop", 0) for ids in responses])
        for prompt, responses in zip(prompts, RESPONSES, strict=True)
    ]
    return Batch.of(groups)


def critic_of(family, folder, **settings):
    """A critic with a nonzero head: a new one gives 0."""
    model = family.load(folder, torch.float32)
    critic = TorchCritic(
        LoadedModel(model, family), SETTINGS, AlgorithmConfig(**settings), OptimizerConfig(lr=1e-3), MinibatchSchedule(1)
    )
    torch.nn.init.normal_(critic.forward.head.weight, generator=torch.Generator().manual_seed(0))
    return critic


def test_a_value_is_read_from_the_state_before_its_token(family, tiny_llama, batch):
    critic, plain, expected = critic_of(family, tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama), []
    for group in batch.groups:
        for sample in group.samples:
            prompt, ids = list(group.prompt.token_ids), list(sample.token_ids)
            with torch.no_grad():
                states = plain.model(torch.tensor([prompt + ids])).last_hidden_state[0]
                values = critic.forward.head(states).flatten()
            expected.append(values[len(prompt) - 1 : len(prompt) - 1 + len(ids)])
    assert torch.allclose(critic.values(batch), torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_the_clip_of_the_run_file_reaches_the_loss(family, tiny_llama, batch, clip):
    critic = critic_of(family, tiny_llama, value_clip=clip)
    now = critic.values(batch)
    random = torch.Generator().manual_seed(1)
    before, returns = (now + torch.randn(now.shape, generator=random) for _ in range(2))
    told = critic.update(replace(batch, values=before, returns=returns))
    values, before, returns = (each.double().numpy() for each in (now, before, returns))
    near = before + np.clip(values - before, -clip, clip)
    free, held = (values - returns) ** 2 / 2, (near - returns) ** 2 / 2
    assert told["critic/loss"] == pytest.approx(np.maximum(free, held).mean(), rel=1e-4)
    assert told["critic/clipfrac"] == pytest.approx((held > free + 1e-9).mean())
    assert (told["critic/clipfrac"] > 0) == (clip < 1)
    assert told["critic/values"] == pytest.approx(values.mean(), rel=1e-4)
    assert told["critic/returns"] == pytest.approx(returns.mean(), rel=1e-4)


def test_a_new_critic_expects_nothing(family, tiny_llama, batch):
    model = family.load(tiny_llama, torch.float32)
    critic = TorchCritic(LoadedModel(model, family), SETTINGS, AlgorithmConfig(), OptimizerConfig(), MinibatchSchedule(1))
    assert not critic.values(batch).any()


def test_in_bf16_it_runs_on_what_it_has_just_learned(family, tiny_llama, batch):
    """Its bf16 copies equal those of a new critic that loaded the weights."""
    settings = replace(SETTINGS, compute_dtype=torch.bfloat16)
    learned, fresh = (
        TorchCritic(LoadedModel(model, family), settings, AlgorithmConfig(), OptimizerConfig(lr=1e-2), MinibatchSchedule(1))
        for model in (family.load(tiny_llama, torch.float32) for _ in range(2))
    )
    before = learned.values(batch)
    learned.update(replace(batch, values=before, returns=torch.linspace(-1, 1, len(before))))
    fresh.forward.load_state_dict(learned.forward.state_dict())
    assert torch.equal(learned.values(batch), fresh.values(batch)) and not torch.equal(learned.values(batch), before)
