"""A frozen vision tower encodes each image once per step for all roles; a trained one encodes it in every pass."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rlcore_backends.common import node_address
from safetensors.torch import load_file, save_file

from rlcore import registry
from rlcore.algorithms import aggregation
from rlcore.algorithms.objective import Objective, tokens
from rlcore.algorithms.schedule import MinibatchSchedule
from rlcore.algorithms.sft import negative_log_likelihood
from rlcore.cli.main import main
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.config.sections import ModelConfig, OptimizerConfig, RolloutConfig
from rlcore.data.sources import training_prompts
from rlcore.errors import ConfigError
from rlcore.model.actor import TorchActor
from rlcore.model.forward import ForwardSettings
from rlcore.model.loaded import LoadedModel
from rlcore.model.packing import deal
from rlcore.model.reference import TorchReference
from rlcore.model.resolved import ResolvedModel
from rlcore.model.vision import VisionEncoder, check_tower, replace_tower
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Group, Row, Sample, Sampling

SETTINGS = ForwardSettings(torch.device("cpu"), torch.float32, 80, 1.0)
SECONDS_BYTES_ROUNDING = (
    "timing/", "memory/", "sync/", "placement/", "mismatch/", "vision/", "e2e_", "tps_", "update_", "vllm_", "decode_",
)  # fmt: skip


SIZES = {  # of tiny models; Qwen3-VL's has features for two of its layers
    "qwen2_vl": {"layers": 1, "vision_layers": 2}, "qwen2_5_vl": {"layers": 1, "vision_layers": 2},
    "qwen3_vl": {"layers": 3, "vision_layers": 3},
}  # fmt: skip
WIDTHS = {"qwen2_vl": 128, "qwen2_5_vl": 128, "qwen3_vl": 128 * 3}  # of an image token's features
every_family = pytest.mark.parametrize("kind", SIZES, indirect=True, scope="module")
both_kinds_of_features = pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"], indirect=True, scope="module")


def make(models, name, kind="qwen2_5_vl", **options):
    folder = models / f"vision_{name}_{kind}"
    if not folder.exists():
        registry.load("models", f"tiny_{kind}")(folder, **{**SIZES[kind], **options})
    return folder


@pytest.fixture(autouse=True)
def _one_thread(backend):
    torch.set_num_threads(1)
    yield
    backend.prepare()


@pytest.fixture(scope="module")
def kind(request):
    """The model's family."""
    return getattr(request, "param", "qwen2_5_vl")


@pytest.fixture(scope="module")
def folder(models, kind):
    return make(models, "policy", kind)


@pytest.fixture(scope="module")
def other(models, kind):
    """A folder of the same model with other weights."""
    return make(models, "other", kind, seed=1)


@pytest.fixture(scope="module")
def family(folder, kind):
    return registry.load("families", kind)(folder)


@pytest.fixture(scope="module")
def prompts(family):
    """Prompts with two, no, three and one image, of two sizes."""
    colors = (["red", "blue"], [], ["green", "black", "white"], ["gray"])
    rows = []
    for number, shown in enumerate(colors):
        images = [Image.new("RGB", (112, 56 + 56 * (place % 2)), color) for place, color in enumerate(shown)]
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "Which?"}]
        rows.append(Row(str(number), [{"role": "user", "content": parts}], images=images))
    return [family.encode(row) for row in rows]


class Reads:
    """Number of images and the tower, for each call."""

    def __init__(self):
        self.images, self.towers = [], []

    def take(self):
        """Images encoded and number of towers used since the last call."""
        result = sum(self.images), len({id(tower) for tower in self.towers})
        self.images, self.towers = [], []
        return result


@pytest.fixture
def read(monkeypatch, family, folder):
    """Records every call of any tower."""
    Tower = type(family.vision_tower(family.meta_model(folder, torch.float32)))
    reads, real = Reads(), Tower.forward

    def counted(self, hidden_states, grid_thw, **rest):
        reads.images.append(len(grid_thw))
        reads.towers.append(self)
        return real(self, hidden_states, grid_thw, **rest)

    monkeypatch.setattr(Tower, "forward", counted)
    return reads


def encoder_of(family, model, images_per_batch=16, settings=SETTINGS):
    return VisionEncoder(family.vision_tower(model), family, settings, images_per_batch)


def batch_of(prompts):
    """Two samples a prompt; the cap above makes several micro-batches of them."""
    samples = [Sample([9, 10, 11], [0.0] * 3, "", "stop", 0), Sample([20], [0.0], "", "stop", 0)]
    return Batch.of([Group(prompt, samples) for prompt in prompts])


def actor_of(family, folder, frozen):
    model = family.load(folder, torch.float32)
    family.vision_tower(model).requires_grad_(not frozen)
    objective = Objective(negative_log_likelihood, aggregation.token_mean, tokens)
    return TorchActor(
        LoadedModel(model, family), SETTINGS, objective, OptimizerConfig(lr=1e-3), MinibatchSchedule(4, minibatches=3, epochs=2)
    )


@every_family
def test_embeddings_take_the_place_of_pixels_and_nothing_else_changes(family, folder, prompts, kind):
    embedded = encoder_of(family, family.load(folder, torch.float32)).embed(prompts)
    for before, after in zip(prompts, embedded, strict=True):
        assert (after.row, after.token_ids, after.position_ids) == (before.row, before.token_ids, before.position_ids)
        if before.vision is None:
            assert after is before
            continue
        assert after.vision.keys() == {"image_embeds", "image_grid_thw"} and "pixel_values" in before.vision
        embeds = after.vision["image_embeds"]
        assert embeds.shape == (after.token_ids.count(family.processor.image_token_id), WIDTHS[kind])
        assert embeds.untyped_storage().nbytes() == embeds.nbytes, "no other prompt's images travel with it"
        assert not embeds.requires_grad and not embeds.is_inference()


@both_kinds_of_features
@pytest.mark.parametrize("images_per_batch", [1, 2, 5])
def test_the_size_of_the_encoders_batches_bounds_them_and_changes_no_number(family, folder, prompts, read, images_per_batch):
    model = family.load(folder, torch.float32)
    whole = encoder_of(family, model).embed(prompts)
    assert read.images == [6] and read.take() == (6, 1)
    parts = encoder_of(family, model, images_per_batch).embed(prompts)
    assert read.images == {1: [1] * 6, 2: [2] * 3, 5: [5, 1]}[images_per_batch]
    for one, other in zip(whole, parts, strict=True):
        assert one.vision is None or torch.allclose(one.vision["image_embeds"], other.vision["image_embeds"], atol=5e-6)


@both_kinds_of_features
def test_embeddings_keep_the_precision_that_the_policy_computes_in(family, folder, prompts):
    settings = ForwardSettings(torch.device("cpu"), torch.bfloat16, 80, 1.0)
    model = family.load(folder, torch.float32).requires_grad_(False)
    embedded = encoder_of(family, model, settings=settings).embed(prompts)
    assert {prompt.vision["image_embeds"].dtype for prompt in embedded if prompt.vision} == {torch.bfloat16}
    role = TorchReference(LoadedModel(model, family), settings)
    assert torch.allclose(role.logprobs(batch_of(embedded)), role.logprobs(batch_of(prompts)), atol=2e-2)


@every_family
def test_embeddings_change_no_number_of_any_role(family, folder, prompts, read):
    """Reference, old log-probabilities, and an update of several optimizer steps, weights included; the tower stays to the
    bit."""
    results = []
    for once in (False, True):
        actor = actor_of(family, folder, frozen=True)
        batch = batch_of(encoder_of(family, actor.model).embed(prompts) if once else prompts)
        read.take()
        before = TorchReference(LoadedModel(actor.model, family), SETTINGS).logprobs(batch)
        metrics = actor.update(batch)
        results.append((before, metrics, actor.logprobs(batch), list(actor.model.parameters())))
        assert (read.take()[0] == 0) == once
    (before, metrics, after, weights), (ours, counted, learned, changed) = results
    assert torch.allclose(before, ours, atol=1e-5) and torch.allclose(after, learned, atol=1e-5)
    assert metrics == pytest.approx(counted, rel=1e-5) and not torch.allclose(before, after, atol=1e-3)
    for one, other in zip(weights, changed, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    loaded = family.vision_tower(family.load(folder, torch.float32)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in family.vision_tower(actor.model).state_dict().items())


@both_kinds_of_features
def test_the_plain_sampler_draws_the_same_from_embeddings(family, folder, prompts, backend, read):
    sampler = registry.load("rollout_engines", "torch")(family, folder, backend, RolloutConfig(), torch.float32, 128, 0)
    pixels = sampler.generate(prompts, Sampling(3, 8, seed=4))
    embedded = encoder_of(family, family.load(folder, torch.float32)).embed(prompts)
    assert read.take() == (6 + 6, 2)
    drawn = sampler.generate(embedded, Sampling(3, 8, seed=4))
    assert read.take() == (0, 0)
    for one, other in zip(pixels, drawn, strict=True):
        assert [sample.token_ids.tolist() for sample in one.samples] == [sample.token_ids.tolist() for sample in other.samples]
        for ours, theirs in zip(one.samples, other.samples, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=5e-6)


@every_family
def test_every_weight_of_a_tower_that_learns_moves(family, folder, prompts):
    actor = actor_of(family, folder, frozen=False)
    before = {name: weight.clone() for name, weight in family.vision_tower(actor.model).named_parameters()}
    actor.update(batch_of(prompts))
    after = family.vision_tower(actor.model).named_parameters()
    assert [name for name, weight in after if torch.equal(weight, before[name])] == []


@pytest.fixture
def start(tmp_path, folder, capsys):
    """Run a small job with one image per row; returns its status, metrics, stderr and folder."""
    figures = {"name": "geometry_figures", "options": {"count": 16, "kinds": ["dots"], "largest": 5}}
    held_out = {"name": "geometry_figures", "options": {"split": "test", "count": 5, "kinds": ["dots"], "largest": 5}}
    settings = {
        "model": {"path": str(folder), "precision": "fp32", "freeze": ["vision"]}, "backend": {"options": {"threads": 1}},
        "data": {"train": figures, "eval": held_out, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 4}, "reward": [{"name": "test_vision.by_length"}],
        "algorithm": {"group_size": 3, "kl_coef": 0.1}, "optimizer": {"lr": 1.0e-3},
        "train": {"steps": 2, "prompts_per_step": 4, "minibatches_per_step": 2, "max_tokens_per_microbatch": 128},
        "logging": {"tensorboard": False},
    }  # fmt: skip

    def run(*overrides, command="grpo", name="run"):
        file, run_folder = tmp_path / "run.yaml", tmp_path / name
        file.write_text(yaml.safe_dump(settings))
        status = main([command, str(file), *overrides, "--run-dir", str(run_folder)])
        path = run_folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return status, rows, capsys.readouterr().err, run_folder

    return run


def flat(response, answer, fields):
    return 1.0


def by_length(response, answer, fields):
    return float(len(response))


def of_the_model(rows):
    """Metrics that depend on weights and samples only: no seconds, bytes, or engine/trainer rounding."""
    return [{name: value for name, value in row.items() if not name.startswith(SECONDS_BYTES_ROUNDING)} for row in rows]


def fused(monkeypatch):
    """From here on every role encodes the pixels itself, with a frozen tower."""
    monkeypatch.setattr(ModelConfig, "images_are_read_once", property(lambda self: False))


EVALUATED = "evaluation={max_new_tokens: 4}"


@both_kinds_of_features
def test_every_image_of_a_step_is_read_once_and_the_run_is_the_fused_models(start, read, monkeypatch):
    """Rollout, reference, old log-probabilities, two optimizer steps, evaluation before and after."""
    status, once, err, _ = start(EVALUATED, name="once")
    assert status == 0, err
    assert read.take() == (2 * 4 + 2 * 5, 1)
    assert [row.get("vision/images_encoded") for row in once] == [None, 4.0, 4.0]
    assert all(row["timing/image_embeds"] > 0 and row["mismatch/max"] < 1e-5 for row in once[1:])
    fused(monkeypatch)
    _, every, _, _ = start(EVALUATED, name="fused")
    assert read.take() == (4 * 2 * 4 + 2 * 5, 3), "rollout, reference, and the actor twice"
    assert not any("vision/images_encoded" in row or "timing/image_embeds" in row for row in every)
    for ours, theirs in zip(of_the_model(once), of_the_model(every), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_pictures_of_replaced_groups_are_read_once_too(start, read):
    status, rows, err, _ = start("algorithm.max_refills=2", "algorithm.kl_coef=0", "reward.0.name=test_vision.flat")
    assert status == 0, err
    assert [row["vision/images_encoded"] for row in rows] == [12.0, 12.0]
    assert read.take() == (24, 1)


def test_a_critic_is_given_what_the_policys_tower_read(start, read):
    status, rows, err, _ = start("algorithm.name=ppo", "critic={optimizer: {lr: 1.0e-2}}")
    assert status == 0, err
    assert read.take() == (2 * 4, 1)
    assert rows[-1]["critic/loss"] != rows[0]["critic/loss"]


def test_a_critic_does_not_learn_the_tower_that_it_does_not_use(folder, backend):
    data = {"train": {"name": "geometry_figures"}, "max_prompt_tokens": 64}
    model = {"path": str(folder), "precision": "fp32", "freeze": ["vision"]}
    settings = {"data": data, "algorithm": {"name": "ppo"}, "critic": {}, "model": model}
    worker = Worker(ResolvedModel(validate(RunConfig, settings), backend))
    worker.load("grpo")
    named = worker.critic.forward.backbone.named_parameters()
    learning = {name.split(".")[1] for name, weight in named if weight.requires_grad}
    assert learning == {"language_model"}


def test_encoder_actor_and_reference_have_one_tower(folder, backend):
    data = {"train": {"name": "geometry_figures"}, "max_prompt_tokens": 64}
    model = {"path": str(folder), "precision": "fp32", "freeze": ["vision"]}
    worker = Worker(ResolvedModel(validate(RunConfig, {"data": data, "model": model, "dpo": {"steps": 1}}), backend))
    worker.load("dpo")
    towers = [worker.resolved.family.vision_tower(role.model) for role in (worker.actor, worker.reference)]
    assert towers[0] is towers[1] is worker.encoder.tower
    layers = [role.model.model.language_model for role in (worker.actor, worker.reference)]
    assert layers[0] is not layers[1]


AWAY = "offload: [parameters, optimizer, reference, engine, vision]"
POOLS = "{train: {roles: [actor, reference, rollout]}, see: {roles: [vision], devices: 2}}"


@pytest.mark.parametrize("placement", [f"placement={{{AWAY}}}", f"placement={{kind: ray, pools: {POOLS}}}"])
def test_where_the_encoder_is_changes_no_number(start, other, cluster, monkeypatch, placement):
    """Offloaded between uses, like everything else; or in its own pool, which loads only the tower."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    tower = f"vision.path={other}"
    _, here, _, _ = start(EVALUATED, tower, name="here")
    status, there, err, _ = start(EVALUATED, tower, placement, name="there")
    assert status == 0, err
    assert [row["vision/images_encoded"] for row in there[1:]] == [4.0, 4.0]
    assert all(row["timing/image_embeds"] > 0 and row["memory/encode"] > 0 for row in there[1:])
    for ours, theirs in zip(of_the_model(here), of_the_model(there), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("section", ["sft={steps: 3, rows_per_step: 4}", "dpo={steps: 3, pairs_per_step: 4}"])
def test_training_without_sampling_reads_each_image_once(start, read, monkeypatch, tmp_path, section):
    Image.new("RGB", (112, 56), "red").save(tmp_path / "red.png")
    pairs = [{"prompt": f"{number}?", "good": "red", "bad": "blue", "image": "red.png"} for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    columns = "options: {answer: null, target: good, rejected: bad, images: image}"
    data = f"data={{train: {{path: {tmp_path / 'rows.jsonl'}, {columns}}}, max_prompt_tokens: 64}}"
    status, once, err, _ = start(section, data, command=section[:3], name="once")
    assert status == 0, err
    assert read.take() == (3 * 4, 1) and [row["vision/images_encoded"] for row in once] == [4.0] * 3
    fused(monkeypatch)
    _, every, _, _ = start(section, data, command=section[:3], name="fused")
    assert not any("vision/images_encoded" in row for row in every)
    for ours, theirs in zip(of_the_model(once), of_the_model(every), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def with_tower(folder, tower, target):
    """`folder` with the vision weights of `tower`."""
    shutil.copytree(folder, target)
    visual = {name: tensor for name, tensor in weights_of(tower).items() if name.startswith("visual.")}
    save_file(weights_of(folder) | visual, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_tower_of_its_own_is_the_fused_model_with_that_tower(start, folder, other, tmp_path, monkeypatch):
    """The numbers of every role, including the engine, and the saved model."""
    status, apart, err, run = start(f"vision.path={other}", "vision.images_per_batch=3", name="apart")
    assert status == 0, err
    _, own, _, _ = start(name="own")
    assert apart[0]["actor/entropy"] != pytest.approx(own[0]["actor/entropy"], rel=1e-4)
    assert all(row["mismatch/max"] < 1e-5 for row in apart)
    saved = weights_of(run / "checkpoints" / "step_000002" / "model")
    for name, tensor in weights_of(other).items():
        assert not name.startswith("visual.") or torch.equal(saved[name], tensor)
    fused(monkeypatch)
    _, every, _, _ = start(f"model.path={with_tower(folder, other, tmp_path / 'fused_model')}", name="fused")
    for ours, theirs in zip(of_the_model(apart), of_the_model(every), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@every_family
def test_a_tower_can_stand_alone_in_its_folder(family, folder, other, tmp_path):
    shutil.copy(other / "config.json", tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in weights_of(other).items()}
    visual = {f"model.{name}": tensor for name, tensor in tensors.items() if name.startswith("visual.")}
    save_file(visual, tmp_path / "tower.safetensors")
    model = family.load(folder, torch.float32)
    replace_tower(model, family, tmp_path)
    expected = family.vision_tower(family.load(other, torch.float32)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in family.vision_tower(model).state_dict().items())
    rest = family.load(folder, torch.float32).model.language_model.state_dict()
    assert all(torch.equal(tensor, rest[name]) for name, tensor in model.model.language_model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_heads": 2}, "has num_heads 2, the policy's has 4; give one that is built like the policy's"),
        ({"vision_layers": 1}, "has depth 1, the policy's has 2"),
        ({"hidden_size": 64}, "has out_hidden_size 64, the policy's has 128"),
    ],
)
def test_a_tower_that_is_built_otherwise_is_refused(folder, models, options, message):
    wrong = make(models, "_".join(map(str, *options.items())), **options)
    with pytest.raises(ConfigError, match=rf"vision\.path: the vision tower in {wrong} {message}"):
        check_tower(folder, wrong)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(0, r"lack 1 of 3\d tensors of the vision tower \({name} first\)"), (127, r"{name} in .* is \[127, 64\], the policy's")],
)
def test_a_tower_whose_files_are_not_what_its_config_says_is_refused(family, folder, other, tmp_path, rows, message):
    shutil.copytree(other, tmp_path / "broken")
    weights, name = weights_of(other), "visual.blocks.1.mlp.up_proj.weight"
    whole = weights.pop(name)
    save_file(weights | ({name: whole[:rows].clone()} if rows else {}), tmp_path / "broken" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"vision\.path: .*" + message.format(name=name)):
        replace_tower(family.load(folder, torch.float32), family, tmp_path / "broken")


def test_a_model_of_another_family_has_no_such_tower(folder, tiny_llama):
    with pytest.raises(ConfigError, match=r"vision\.path: .* is of the family 'llama', the policy of 'qwen2_5_vl'; give one"):
        check_tower(folder, tiny_llama)
    with pytest.raises(ConfigError, match=r"vision\.path: models of the family 'llama' read text only; remove vision\.path"):
        check_tower(tiny_llama, tiny_llama)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vision.path=nowhere"], "vision.path: 'nowhere' is neither a folder nor an installed model source; sources: "),
        (["vision.path=x", "model.freeze=[]"], "vision.path: a vision tower from elsewhere stands beside the actor and does not"
         " learn with it; add vision to model.freeze or remove vision.path"),
        (["vision.images_per_batch=0"], "vision.images_per_batch: input should be greater than 0; it is 0"),
        (["placement={pools: {a: {roles: [actor, rollout, vision]}}, kind: ray}", "model.freeze=[]"],
         "placement.pools.a.roles: a vision tower that learns is a part of the actor; add vision to model.freeze or remove it"),
        (["algorithm.name=ppo", "critic={path: x}"], "critic.path: under model.freeze [vision] the critic is given images as"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_before_anything_is_written(start, overrides, message):
    status, _, said, folder = start(*overrides)
    assert status == 2 and said.startswith(f"rlcore: {message}")
    assert not folder.exists()


# two ranks


def test_ranks_that_share_the_models_weights_read_the_images_between_them(folder, other, tmp_path, backend):
    """Each runs the whole tower on its half of the prompts; weights after an update equal one rank's."""
    settings = {
        "model": {"path": str(folder), "freeze": ["vision"], "precision": "fp32"}, "vision": {"path": str(other)},
        "dpo": {"steps": 1},
        "data": {"train": {"name": "geometry_figures"}, "max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 8},
        "train": {"max_tokens_per_microbatch": 80},
    }  # fmt: skip
    address = node_address.free_endpoint("127.0.0.1")
    arguments = [sys.executable, __file__, json.dumps(settings), address, str(tmp_path)]
    ranks = [subprocess.Popen([*arguments, str(mine)], env={**os.environ, "OMP_NUM_THREADS": "1"}) for mine in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    expected = updated(Worker(ResolvedModel(validate(RunConfig, settings), backend)))
    before = weights_of(with_tower(folder, other, tmp_path / "before"))
    for rank in range(2):
        theirs = load_file(tmp_path / f"{rank}.safetensors")
        assert theirs.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(theirs[name], tensor, atol=1e-6)
            assert torch.equal(tensor, before[name]) == name.startswith("visual.")


def updated(worker, ranks=1, mine=0):
    """The weights after one DPO step, with this rank's part of the batch."""
    worker.load("dpo")
    prompts = training_prompts(worker.config.data, worker.resolved.family, seed=0).draw(4)
    own = prompts[4 * mine // ranks : 4 * (mine + 1) // ranks]
    read = [worker.embed([prompt.vision for prompt in own])]
    if ranks > 1:
        read = [*read, None]
        torch.distributed.all_gather_object(read, read[0])
    visions = [vision for part in read for vision in part]
    batch = batch_of([replace(prompt, vision=vision) for prompt, vision in zip(prompts, visions, strict=True)])
    (step,) = worker.actor.schedule.steps(batch, worker.actor.objective, 0)
    part, _ = deal(step, ranks, 80, whole_groups=True)[mine]
    worker.update([replace(part, ref_logprobs=worker.reference_logprobs(part))])
    return {name: tensor.clone() for name, tensor in worker.actor.weights()}


def rank(settings, address, folder, mine):
    kind = registry.load("backends", "cpu")
    worker = Worker(
        ResolvedModel(validate(RunConfig, settings), kind(kind.Options(threads=1))), {"actor", "reference", "vision"}
    )
    worker.join(mine, 2, address)
    save_file(updated(worker, 2, mine), folder / f"{mine}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank(json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
