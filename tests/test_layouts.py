"""One batch in every layout: padded by transformers, packed sample by sample, packed with shared prompts; in one, two and
eight micro-batches; on one rank and on two. Loss and gradient are the same for every algorithm."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from rlcore_backends.common import node_address
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.loss import objective, policy_loss
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import PRESETS, AlgorithmConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.packing import deal, microbatches
from rlcore.types import Batch, Group, Row, Sample, TokenLoss, TokenView

LIMIT = 9
SETTINGS = {
    **{name: {"name": name} for name in PRESETS},
    "sequence mean, k3": {"aggregation": "sequence_mean", "kl_coef": 0.1, "entropy_coef": 0.01},
    "token_tis": {"correction": "token_tis"},
    "sequence_tis": {"correction": "sequence_tis"},
    "geometric": {"correction": "geometric", "correction_low": 0.98, "correction_high": 1.02},
}
SHARED = {1: 4096, 2: 60, 8: 28}  # number of micro-batches of these 16 samples -> token cap
ROUNDING = 3e-6  # fp32 against float64: transformers' own padded fp32 pass differs by 1.6e-6
ALONE = {1: 4096, 2: 200, 8: 50}  # likewise, with a prompt copy per sample


@pytest.fixture(autouse=True)
def _one_thread(backend):
    torch.set_num_threads(1)
    yield
    backend.prepare()


@pytest.fixture(scope="module")
def family(tiny_llama):
    return registry.load("families", "llama")(tiny_llama)


def batch_of(family):
    """Two prompts x 8 responses of 1 to 9 tokens; every input of an algorithm is slightly perturbed."""
    random = torch.Generator().manual_seed(1)

    def near(values, width):
        return values + width * torch.randn(len(values), generator=random)

    rows = [Row(text, [{"role": "user", "content": text}]) for text in ("3 + 4?", "What is 12 + 30?")]
    groups = []
    for row in rows:
        lengths = torch.randint(1, LIMIT + 1, (8,), generator=random).tolist()
        ids = [torch.randint(8, 200, (length,), generator=random).tolist() for length in lengths]
        groups.append(Group(family.encode(row), [Sample(each, [0.0] * len(each), "", "stop", 0) for each in ids]))
    batch = Batch.of(groups)
    old = near(torch.full((len(batch.loss_mask),), -5.3), 0.3)
    return replace(
        batch, old_logprobs=old, rollout_logprobs=near(old, 0.05), ref_logprobs=near(old, 0.1), kl_coef=0.1,
        advantages=batch.per_token(torch.randn(16, generator=random)), loss_mask=batch.per_token(torch.arange(16) != 5),
    )  # fmt: skip


def alone(batch):
    """Every sample with its own copy of the prompt."""
    return replace(batch, groups=[Group(group.prompt, [sample]) for group in batch.groups for sample in group.samples])


def actor_of(family, folder, config, cap, sharding=None):
    settings = ForwardSettings(torch.device("cpu"), torch.float32, cap, 0.9)
    unclipped = OptimizerConfig(max_grad_norm=1e9)
    model = family.load(folder, torch.float32)
    return TorchActor(
        LoadedModel(model, family, sharding), settings, objective(config, LIMIT), unclipped, MinibatchSchedule(1)
    )


def gradient_of(actor, batch):
    """The whole loss, and the gradient as one vector, just before the optimizer steps."""
    seen = []
    hook = actor.learner.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([parameter.grad.flatten() for parameter in actor.model.parameters()]))
    )
    state = {name: tensor.clone() for name, tensor in actor.model.state_dict().items()}
    metrics = actor.update(batch)
    actor.model.load_state_dict(state)
    hook.remove()
    return metrics, seen[0]


def padded(family, folder, batch, config, shift=None):
    """Loss and gradient from transformers' own padded forward pass in float64, with the same loss formula."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    if shift is not None:
        weights = list(model.parameters())
        with torch.no_grad():
            for weight, part in zip(weights, shift.split([weight.numel() for weight in weights]), strict=True):
                weight += part.view_as(weight)
    sequences = [(group.prompt.token_ids, sample.token_ids.tolist()) for group in batch.groups for sample in group.samples]
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, mask = torch.zeros(len(sequences), width, dtype=torch.int64), torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[row, : len(prompt) + len(response)] = 1
    distribution = (model(input_ids=ids, attention_mask=mask, use_cache=False).logits / 0.9).log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    logprobs, entropies = [], []
    for row, (prompt, response) in enumerate(sequences):
        places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        logprobs.append(distribution[row, places].gather(1, torch.tensor(response)[:, None])[:, 0])
        entropies.append(entropy[row, places])
    keep = batch.loss_mask
    view = TokenView(
        torch.cat(logprobs)[keep], torch.cat(entropies)[keep], batch.sequence[keep].unique_consecutive(return_inverse=True)[1],
        batch.rollout_logprobs[keep], batch.advantages[keep], batch.ref_logprobs[keep], batch.old_logprobs[keep], batch.kl_coef,
    )  # fmt: skip
    loss = (policy_loss(view, config).loss * aggregation.loss_weights(batch, config, LIMIT)[keep]).sum()
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def pictured(family):
    """Prompts with two images, none and one, three samples each."""
    random = torch.Generator().manual_seed(2)
    groups = []
    for number, sizes in enumerate((((96, 128), (64, 64)), (), ((128, 80),))):
        pixels = (torch.randint(256, (*size, 3), generator=random, dtype=torch.uint8).numpy() for size in sizes)
        images = [Image.fromarray(array) for array in pixels]
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
        prompt = family.encode(Row(str(number), [{"role": "user", "content": parts}], images=images))
        ids = [torch.randint(8, 200, (length,), generator=random).tolist() for length in (5, 1, 3)]
        groups.append(Group(prompt, [Sample(each, [0.0] * len(each), "", "stop", 0) for each in ids]))
    batch = Batch.of(groups)
    return replace(batch, advantages=torch.randn(len(batch.loss_mask), generator=random))


def padded_images(folder, batch, image_token):
    """Gradient of the mean of log-probability x advantage, by transformers' own forward pass over padded sequences."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    rows = [(group.prompt, sample.token_ids.tolist()) for group in batch.groups for sample in group.samples]
    width = max(len(prompt.token_ids) + len(response) for prompt, response in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, (prompt, response) in enumerate(rows):
        length = len(prompt.token_ids) + len(response)
        ids[row, :length], mask[row, :length] = torch.tensor(prompt.token_ids + response), 1
    seen = [prompt.vision for prompt, _ in rows if prompt.vision]
    images = {key: torch.cat([vision[key] for vision in seen]) for key in ("pixel_values", "image_grid_thw")}
    types = (ids == image_token).int()
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, use_cache=False, **images).logits
    logprobs, taken = logits.log_softmax(-1), []
    for row, (prompt, response) in enumerate(rows):
        places = slice(len(prompt.token_ids) - 1, len(prompt.token_ids) + len(response) - 1)
        taken.append(logprobs[row, places].gather(1, torch.tensor(response)[:, None])[:, 0])
    (-torch.cat(taken) * batch.advantages).mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def apart(gradient, yardstick):
    return float((gradient - yardstick).norm() / yardstick.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_every_layout_has_the_padded_gradient(family, tiny_llama, name):
    config = AlgorithmConfig(**SETTINGS[name])
    batch = batch_of(family)
    _, yardstick = padded(family, tiny_llama, batch, config)
    reports, gradients = [], []
    for layout, caps in ((batch, SHARED), (alone(batch), ALONE)):
        for count, cap in caps.items():
            assert len(microbatches(layout, cap)) == count
            metrics, gradient = gradient_of(actor_of(family, tiny_llama, config, cap), layout)
            assert apart(gradient, yardstick) < ROUNDING, (len(layout.groups), count)
            reports.append(metrics)
            gradients.append(gradient)
    for report, gradient in zip(reports, gradients, strict=True):
        assert report == pytest.approx(reports[0], rel=1e-5, abs=1e-6)
        assert apart(gradient, gradients[0]) < 1e-6


def weighted(view):
    return TokenLoss(-view.logprobs * view.advantages)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_layout_of_images_has_the_padded_gradient(kind, models):
    """The tower's weights included, whether it reads the images of a row together or of each row alone."""
    folder = models / f"layouts_{kind}"
    registry.load("models", f"tiny_{kind}")(folder, layers=3, vision_layers=3)
    family = registry.load("families", kind)(folder)
    batch = pictured(family)
    yardstick = padded_images(folder, batch, family.processor.image_token_id)
    gradients = []
    for layout, cap in ((batch, 4096), (batch, 50), (alone(batch), 200)):
        actor = actor_of(family, folder, AlgorithmConfig(), cap)
        actor.objective = Objective(weighted, aggregation.token_mean, tokens)
        actor.forward.settings = replace(actor.forward.settings, temperature=1.0)
        gradients.append(gradient_of(actor, layout)[1])
        assert apart(gradients[-1], yardstick) < 1e-5, (len(layout.groups), cap)
    assert max(apart(gradient, gradients[0]) for gradient in gradients) < 5e-6


def test_the_gradient_is_the_slope_of_the_loss(family, tiny_llama):
    """Along the gradient itself, by central differences of a float64 forward pass."""
    config, batch = AlgorithmConfig(), batch_of(family)
    _, gradient = gradient_of(actor_of(family, tiny_llama, config, 4096), batch)
    step = 1e-3 * gradient / gradient.norm()
    above, below = (padded(family, tiny_llama, batch, config, shift=sign * step)[0] for sign in (1, -1))
    assert (above - below) / 2e-3 == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_a_mean_by_micro_batch_is_caught(family, tiny_llama, monkeypatch):
    """The classic mistake: each micro-batch divides by its own tokens."""
    config, batch = AlgorithmConfig(), batch_of(family)
    _, yardstick = padded(family, tiny_llama, batch, config)

    def local(view):
        result = policy_loss(view, config)
        return replace(result, loss=result.loss / len(view.logprobs) * int(batch.loss_mask.sum()) / 2)

    actor = actor_of(family, tiny_llama, config, SHARED[2])
    actor.objective = replace(actor.objective, loss=local)
    assert apart(gradient_of(actor, batch)[1], yardstick) > 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_at_rate_0_the_second_pass_over_a_batch_has_ratio_1(family, tiny_llama, name):
    config, batch = AlgorithmConfig(name=name), batch_of(family)
    for cap in SHARED.values():
        actor = actor_of(family, tiny_llama, config, cap)
        actor.schedule = MinibatchSchedule(total_steps=4, minibatches=2, epochs=2)
        actor.learner.config = OptimizerConfig.model_construct(**{**OptimizerConfig().model_dump(), "lr": 0.0, "min_lr": 0.0})
        metrics = actor.update(replace(batch, old_logprobs=actor.logprobs(batch)))
        assert metrics["actor/pg_clipfrac"] == 0
        assert metrics["actor/ratio_max"] == pytest.approx(1, abs=2e-6)
        assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=2e-6)


def test_groups_are_shuffled_into_equal_shares_and_each_comes_once_a_pass():
    schedule = MinibatchSchedule(total_steps=1, minibatches=4, epochs=3, seed=5)
    shares = list(schedule.minibatches_of(8, done=0))
    assert [len(share) for share in shares] == [2] * 12
    orders = [[group for share in shares[first : first + 4] for group in share] for first in (0, 4, 8)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert list(schedule.minibatches_of(8, done=0)) == shares != list(schedule.minibatches_of(8, done=12))
    assert list(MinibatchSchedule(1).minibatches_of(3, 0)) == [[0, 1, 2]]


# two ranks


def test_two_ranks_have_the_gradient_of_one(family, tiny_llama, tmp_path):
    """With sharded weights, and with replicated ones that stay gathered."""
    addresses = [node_address.free_endpoint("127.0.0.1") for _ in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, __file__, str(tiny_llama), str(tmp_path), *addresses]
    ranks = [subprocess.Popen([*arguments, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for name, settings in SETTINGS.items():
        config = AlgorithmConfig(**settings)
        metrics, gradient = gradient_of(actor_of(family, tiny_llama, config, 4096), batch_of(family))
        for rank, replicas in product(range(2), (1, 2)):
            theirs = torch.load(tmp_path / f"{rank} {replicas} {name}.pt", weights_only=True)
            assert apart(theirs["gradient"], gradient) < 1e-6, name
            assert theirs["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def rank(folder, results, address, replicas, mine):
    """One of two ranks: each algorithm on its own prompt; one prompt makes more rows than the other."""
    from torch import distributed as dist

    from rlcore.distributed import world
    from rlcore.distributed.fsdp import Sharding
    from rlcore.model.optimizer import StepStatistics

    kind = registry.load("backends", "cpu")
    backend = kind(kind.Options(threads=1))
    backend.prepare()
    ranks = world.join(mine, 2, address, backend.collectives(), backend.device(0), replicas, sequence=1)
    family = registry.load("families", "llama")(folder)
    for name, settings in SETTINGS.items():
        sharding = Sharding(ranks.mesh, torch.float32, reshard_after_forward=replicas == 1)
        actor = actor_of(family, folder, AlgorithmConfig(**settings), 60, sharding)
        (step,) = actor.schedule.steps(batch_of(family), actor.objective, 0)
        seen = []
        actor.learner.optimizer.register_step_pre_hook(lambda *_, actor=actor, seen=seen: seen.extend(
            world.whole(parameter.grad).flatten() for parameter in actor.model.parameters()
        ))  # fmt: skip
        (part, _), (other, _) = [deal(step, 2, 60)[one] for one in (mine, 1 - mine)]
        assert part.rows == other.rows
        statistics_of_ranks = [None, None]
        dist.all_gather_object(statistics_of_ranks, actor.step(part))
        total = StepStatistics()
        for statistics in statistics_of_ranks:
            total += statistics
        found = {"gradient": torch.cat(seen), "metrics": total.metrics(step.denominator)}
        torch.save(found, results / f"{mine} {replicas} {name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    for replicas, address in enumerate(sys.argv[3:5], start=1):
        rank(Path(sys.argv[1]), Path(sys.argv[2]), address, replicas, int(sys.argv[5]))
