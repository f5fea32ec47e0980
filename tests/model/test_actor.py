"""bf16 compute equals the fp32 model up to rounding: log-probabilities and gradient; weights stay fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from saving import save

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.actor import TorchActor
from rlcore.model.critic import TorchCritic
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.types import Batch, Group, Row, Sample


@pytest.fixture(scope="module")
def family(tiny_llama):
    return registry.load("families", "llama")(tiny_llama)


@pytest.fixture(scope="module")
def batch(family):
    rows = [Row(text, [{"role": "user", "content": text}]) for text in ("What is 3 + 4?", "And 12 + 30?")]
    generator = torch.Generator().manual_seed(0)
    responses = [[torch.randint(8, 200, (length,), generator=generator).tolist() for length in (3, 5)] for _ in rows]
    return Batch.of([
        Group(family.encode(row), [Sample(ids, [0.0] * len(ids), "", "length", 0) for ids in group])
        for row, group in zip(rows, responses, strict=True)
    ])  # fmt: skip


def actor(family, folder, dtype):
    settings = ForwardSettings(torch.device("cpu"), dtype, 256, 1.0)
    model = family.load(folder, torch.float32)
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TorchActor(
        LoadedModel(model, family), settings, objective, OptimizerConfig(lr=1e-3), MinibatchSchedule(total_steps=1)
    )


@pytest.fixture
def both(family, tiny_llama):
    return [actor(family, tiny_llama, dtype) for dtype in (torch.float32, torch.bfloat16)]


def test_bf16_logprobs_are_those_of_fp32_to_rounding(both, batch):
    exact, rounded = (one.logprobs(batch) for one in both)
    assert 0 < (exact - rounded).abs().max() < 0.05
    assert rounded.dtype == torch.float32


def test_a_bf16_update_takes_the_fp32_step_to_rounding(both, batch):
    before = [parameter.detach().clone() for parameter in both[0].model.parameters()]
    norms = [one.update(batch)["grad_norm"] for one in both]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert {parameter.dtype for parameter in both[1].model.parameters()} == {torch.float32}
    steps = [
        torch.cat([(new - old).flatten() for new, old in zip(one.model.parameters(), before, strict=True)]) for one in both
    ]
    assert torch.cosine_similarity(*steps, dim=0) > 0.95


def test_supervised_steps_make_their_targets_likelier(family, tiny_llama, batch):
    one = actor(family, tiny_llama, torch.float32)
    before = one.logprobs(batch)
    for _ in range(3):
        one.update(batch)
    assert one.logprobs(batch).mean() > before.mean() + 0.1


def test_a_critic_begins_with_nothing_and_goes_on_from_what_it_saved(family, tiny_llama, batch, tmp_path):
    def critic():
        settings = ForwardSettings(torch.device("cpu"), torch.float32, 256, 1.0)
        model = family.load(tiny_llama, torch.float32)
        return TorchCritic(
            LoadedModel(model, family), settings, AlgorithmConfig(), OptimizerConfig(lr=1e-2), MinibatchSchedule(total_steps=4)
        )

    first, returns = critic(), torch.linspace(-1, 1, len(batch.loss_mask))
    assert not first.values(batch).any()
    judged = replace(batch, values=torch.zeros_like(returns), returns=returns)
    first.update(judged)
    save(first, tmp_path)
    again = critic()
    again.load(tmp_path)
    assert torch.equal(again.values(batch), first.values(batch)) and first.values(batch).any()
    assert again.update(judged) == first.update(judged)
    assert torch.equal(again.values(batch), first.values(batch)), "moments too"
