"""Four ranks with sequence parallelism of 2 or 4: log-probabilities, entropies, values and gradients equal one rank's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rlcore_backends.common import node_address
from torch.distributed.tensor import distribute_tensor

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.config.algorithm import AlgorithmConfig
from rlcore.config.schema import RunConfig
from rlcore.config.sections import OptimizerConfig
from rlcore.distributed import world
from rlcore.distributed.fsdp import Sharding
from rlcore.errors import ConfigError
from rlcore.model.actor import TorchActor
from rlcore.model.critic import OBJECTIVE, TorchCritic
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.packing import deal
from rlcore.model.resolved import ResolvedModel
from rlcore.model.vision import VisionEncoder
from rlcore.types import Batch, Group, Prompt, Row, Sample, TokenLoss

MODELS = {  # fewer KV heads than ranks, and a KV head count not divisible by them
    "tiny_llama": {"hidden_size": 96, "heads": 12, "key_value_heads": 3, "layers": 2},
    "tiny_qwen3": {"hidden_size": 64, "heads": 4, "key_value_heads": 1, "layers": 2},
    "tiny_qwen3_moe": {"hidden_size": 64, "layers": 2, "experts": 6},
    "tiny_qwen2_vl": {"hidden_size": 64, "layers": 1, "vision_layers": 1},
    "tiny_qwen2_5_vl": {"layers": 2, "vision_layers": 2},
    "tiny_qwen3_vl": {"hidden_size": 64, "layers": 3, "vision_layers": 3},  # features for the first two layers
}
BOUND = 1e-5  # relative, per parameter gradient; most are within 5e-7
CAP = 80  # several micro-batches
UNCLIPPED = OptimizerConfig(max_grad_norm=1e9)


def loss(view):
    return TokenLoss(view.advantages * view.logprobs - 0.1 * view.entropy, {"logprobs": view.logprobs, "entropy": view.entropy})


def actor_of(folder, cap=CAP, frozen=False, checkpointed=False, sequence=None, sharding=None):
    family = family_of(folder)
    model = family.load(folder, torch.float32)
    if frozen:
        family.vision_tower(model).requires_grad_(False)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return TorchActor(
        LoadedModel(model, family, sharding, tower=family.vision_tower(model) if frozen else None), settings_of(cap, sequence),
        Objective(loss, aggregation.token_mean, tokens), UNCLIPPED, MinibatchSchedule(1),
    )  # fmt: skip


def critic_of(folder, sequence=None, sharding=None):
    family = family_of(folder)
    model, settings = family.load(folder, torch.float32), settings_of(CAP, sequence)
    role = TorchCritic(LoadedModel(model, family, sharding), settings, AlgorithmConfig(), UNCLIPPED, MinibatchSchedule(1))
    weight, values = role.forward.head.weight, torch.linspace(-1, 1, 96)[None]
    with torch.no_grad():
        weight.copy_(distribute_tensor(values, weight.device_mesh, weight.placements) if sharding else values)
    return role


def family_of(folder):
    return registry.load("families", folder.name.removeprefix("tiny_"))(folder)


def settings_of(cap, sequence):
    return ForwardSettings(torch.device("cpu"), torch.float32, cap, 0.9, sequence)


# contents of the rows


def batch_of(groups):
    """One sample is masked out, so a rank does not train on all its targets."""
    random = torch.Generator().manual_seed(2)
    batch = Batch.of(groups)
    drawn = [torch.randn(len(batch.loss_mask), generator=random) for _ in range(3)]
    mask = batch.per_token(torch.arange(len(batch.samples)) != 1)
    return replace(batch, advantages=drawn[0], values=drawn[1], returns=drawn[2], loss_mask=mask)


def samples(*lengths):
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randint(8, 200, (length,), generator=random).tolist() for length in lengths]
    return [Sample(ids, [0.0] * len(ids), "", "stop", 0) for ids in drawn]


def questions(folder):
    """Three prompts with four samples each."""
    rows = [Row(text, [{"role": "user", "content": text}]) for text in ("3 + 4?", "What is 12 + 30?", "5?")]
    return batch_of([Group(family_of(folder).encode(row), samples(9, 4, 1, 6)) for row in rows])


def pictures(folder, heights_of_each=((56, 112), (84,), ())):
    """Prompts with two images, one and none."""
    random = np.random.default_rng(0)
    groups = []
    for number, heights in enumerate(heights_of_each):
        images = [Image.fromarray(random.integers(0, 255, (height, 112, 3), dtype=np.uint8)) for height in heights]
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
        row = Row(str(number), [{"role": "user", "content": parts}], images=images)
        groups.append(Group(family_of(folder).encode(row), samples(5, 2)))
    return batch_of(groups)


def a_picture_for_one(folder):
    """Two rows, one without an image: with two groups of two ranks, one group's tower has no input."""
    return pictures(folder, ((84,), ()))


def pictures_read(folder):
    """`pictures` with embeddings computed by a frozen tower."""
    batch, family = pictures(folder), family_of(folder)
    tower = family.vision_tower(family.load(folder, torch.float32))
    prompts = VisionEncoder(tower, family, settings_of(CAP, None), 2).embed([group.prompt for group in batch.groups])
    return replace(batch, groups=[replace(group, prompt=prompt) for group, prompt in zip(batch.groups, prompts, strict=True)])


def shortest(_):
    """A row of two tokens, fewer than ranks: with two groups of two ranks, one group has no row."""
    return batch_of([Group(Prompt(Row("short", []), [9], [9]), samples(2))])


CASES = {
    "several rows": ("tiny_llama", actor_of, {}, questions),
    "checkpointed layers": ("tiny_qwen3", actor_of, {"cap": 4096, "checkpointed": True}, questions),
    "experts": ("tiny_qwen3_moe", actor_of, {"checkpointed": True}, questions),
    "two tokens": ("tiny_qwen3", actor_of, {}, shortest),
    "a tower that learns": ("tiny_qwen2_5_vl", actor_of, {}, pictures),
    "a tower that learns from some": ("tiny_qwen2_vl", actor_of, {"cap": 40}, a_picture_for_one),
    "features for several layers": ("tiny_qwen3_vl", actor_of, {"checkpointed": True}, pictures),
    "a frozen tower": ("tiny_qwen3_vl", actor_of, {"cap": 4096, "frozen": True}, pictures_read),
    "a critic": ("tiny_llama", critic_of, {}, questions),
}


# results of a rank


def found(models, case, sharing=1, ranks=world.ALONE):
    """One optimizer step: inputs and results of each local token, their indices in [N], and the gradients."""
    name, role_of, options, rows = CASES[case]
    sharding = Sharding(ranks.mesh, torch.float32) if ranks.mesh else None
    role, gradients = role_of(models / name, sequence=ranks.sequence, sharding=sharding, **options), {}
    role.learner.optimizer.register_step_pre_hook(lambda *_: gradients.update(
        (name, world.whole(weight.grad)) for name, weight in role.learner.model.named_parameters() if weight.requires_grad
    ))  # fmt: skip
    (step,) = role.schedule.steps(rows(models / name), getattr(role, "objective", OBJECTIVE), 0)
    part, places = deal(step, ranks.size // sharing, role.settings.max_tokens)[ranks.rank // sharing]
    tokens = {"given": role.values(part) if role_of is critic_of else role.logprobs(part)}
    role.learner.step(part, seen(role._losses(part), tokens, len(places)))
    routing = role._routing.end() if role_of is actor_of else None
    return {"tokens": tokens, "places": places, "gradients": gradients, "routing": routing.sums if routing else torch.zeros(0)}


def seen(losses, tokens, count):
    for index, result in losses:
        for name, values in result.means.items():
            tokens.setdefault(name, torch.zeros(count))[index] = values.detach()
        yield index, result


def kept(models, sequence=None):
    """Bytes that a forward pass over a long row saves for backward, excluding weights."""
    role, storages = actor_of(models / "tiny_llama", cap=4096, sequence=sequence), {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    prompt = Prompt(Row("long", []), [9] * 1000, [9] * 1000)
    (step,) = role.schedule.steps(batch_of([Group(prompt, samples(50, 50, 50, 50))]), role.objective, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _losses = list(role._losses(step))  # keep alive: a freed address could be reused and miscounted
    weights = {weight.untyped_storage().data_ptr() for weight in role.model.parameters()}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)


def rank(models, results, mine, *addresses):
    """One of four ranks: shares rows with one other rank, then with all."""
    from torch import distributed as dist

    kind = registry.load("backends", "cpu")
    backend = kind(kind.Options(threads=1))
    backend.prepare()
    for sharing, address in zip((2, 4), addresses, strict=True):
        ranks = world.join(mine, 4, address, backend.collectives(), backend.device(0), replicas=1, sequence=sharing)
        everything = {case: found(models, case, sharing, ranks) for case in CASES}
        torch.save({**everything, "kept": kept(models, ranks.sequence)}, results / f"{sharing} {mine}.pt")
        dist.destroy_process_group()


# expected results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    for name, options in MODELS.items():
        registry.load("models", name)(folder / name, **options)
    return folder


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    results = tmp_path_factory.mktemp("ranks")
    addresses = [node_address.free_endpoint("127.0.0.1") for _ in range(2)]
    command = [sys.executable, __file__, str(folders), str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(mine), *addresses], env=environment) for mine in range(4)]
    assert [process.wait(timeout=300) for process in ranks] == [0] * 4
    return results


@pytest.fixture(scope="module", params=[2, 4])
def sharing(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(results, sharing):
    """Results of each rank."""
    return [torch.load(results / f"{sharing} {mine}.pt", weights_only=True) for mine in range(4)]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_what_one_rank_has(folders, theirs, sharing, case):
    alone = found(folders, case)
    for one in (each[case] for each in theirs):
        for name, expected in alone["tokens"].items():
            values = one["tokens"].get(name, torch.empty(0))  # a rank without rows has none
            assert torch.allclose(values, expected[one["places"]], rtol=BOUND, atol=BOUND), name
        assert one["gradients"].keys() == alone["gradients"].keys()
        for name, expected in alone["gradients"].items():
            assert (one["gradients"][name] - expected).norm() <= BOUND * expected.norm(), name
    assert sum(len(each[case]["places"]) for each in theirs) == sharing * len(alone["places"])
    assert torch.allclose(sum(each[case]["routing"] for each in theirs) / sharing, alone["routing"], rtol=BOUND)


def test_a_rank_keeps_its_share_of_a_long_row(folders, theirs, sharing):
    share = {2: 0.6, 4: 0.4}[sharing]  # masks and repeated KV heads are not split
    assert max(each["kept"] for each in theirs) < share * kept(folders)


def test_query_heads_that_cannot_be_dealt_are_refused_before_anything_is_loaded(folders, backend):
    config = RunConfig.model_validate({
        "model": {"path": str(folders / "tiny_qwen2_5_vl"), "precision": "fp32"}, "data": {"train": {"name": "arithmetic"}},
        "placement": {"kind": "ray", "devices": 3}, "sharding": {"sequence_parallel": 3},
    })  # fmt: skip
    wrong = r"sharding\.sequence_parallel: 3 devices do not divide the model's 4 query heads; use one of 1, 2, 4"
    with pytest.raises(ConfigError, match=wrong):
        ResolvedModel(config, backend)


if __name__ == "__main__":
    rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
