"""Results do not depend on where roles run: in this process, in one worker pool, or in several."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from run_files import first_prompts, settings
from weight_models import tensors

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.placement import ROLES
from rlcore.config.schema import RunConfig
from rlcore.errors import PluginError
from rlcore.model.resolved import ResolvedModel
from rlcore.monitor.clock import Span, timings
from rlcore.runtime import placement
from rlcore.runtime.placement import Placement
from rlcore.runtime.pool import Pool, merged
from rlcore.runtime.roles import PooledRollout
from rlcore.runtime.watchdog import Watchdog
from rlcore.runtime.worker import Worker
from rlcore.types import Batch, Prompt, Receipt, Row, Sampling

STEPS, CALLS = 3, 20  # steps, reward calls per step
KILLED_AT = 2 * CALLS + 3
calls = 0
EVERYTHING_AWAY = "offload: [parameters, optimizer, reference, engine]"
ONE = "placement={kind: ray}"
TWO = "placement={kind: ray, devices: 2}"
TOGETHER = f"placement={{kind: ray, devices: 2, {EVERYTHING_AWAY}}}"
POOLS = "{train: {roles: [actor], devices: 2}, sample: {roles: [rollout], devices: 2}, fixed: {roles: [reference]}}"
APART = f"placement={{kind: ray, reward_workers: 2, pools: {POOLS}}}"


def graded(response, answer, fields):
    return len(set(response)) / 10


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, cluster):
    """Run the command; returns the run folder."""
    settings = {
        "model": {"path": str(tiny_llama), "precision": "fp32"}, "backend": {"options": {"threads": 1}},
        "data": {"train": {"name": "arithmetic", "options": {"count": 64, "max_value": 9}}, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 6}, "reward": [{"name": "test_placement.graded"}],
        "algorithm": {"group_size": 4, "kl_coef": 0.1}, "optimizer": {"lr": 1e-3},
        "train": {
            "steps": STEPS, "prompts_per_step": 5, "minibatches_per_step": 1, "max_tokens_per_microbatch": 80, "save_every": 2,
        },
        "logging": {"tensorboard": False, "samples_on_console": 0},
    }  # fmt: skip
    base = tmp_path_factory.mktemp("placements")
    (base / "run.yaml").write_text(yaml.safe_dump(settings))

    def start(name, *overrides, status=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(Path(__file__).parent))
            assert main(["grpo", str(base / "run.yaml"), *overrides, "--run-dir", str(base / name)]) == status
        return base / name

    return start


@pytest.fixture(scope="module")
def local(run):
    return run("local")


@pytest.fixture(scope="module")
def together(run):
    return run("together", TOGETHER)


def rows(folder):
    clock = re.compile(r"timing/.*|memory/.*|sync/.*|.*_tps|tps_throughput|data/staleness|placement/bytes")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not clock.fullmatch(name)} for line in lines]


def written(folder):
    """Samples and weights, for bitwise comparison."""
    weights = tensors(folder / "checkpoints" / f"step_{STEPS:06d}" / "model")
    return (folder / "samples.jsonl").read_bytes(), {name: weight.numpy().tobytes() for name, weight in weights.items()}


def test_one_worker_elsewhere_is_this_process_to_the_bit(run, local):
    elsewhere = run("one", ONE)
    assert written(elsewhere) == written(local)
    assert rows(elsewhere) == rows(local)


def test_bytes_between_processes_are_counted_by_step(local, together):
    """5 prompts x 4 samples take 20 kilobytes sent once for reference and update, 25 if sent with each call; a local run
    sends nothing. Steps are counted separately."""
    lines = [[json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()] for one in (local, together)]
    here, there = ([line["placement/bytes"] for line in of] for of in lines)
    assert here == [0] * STEPS
    assert all(10_000 < size < 23_000 for size in there)
    assert max(there) < 1.2 * min(there)


def test_two_workers_are_one_to_rounding(together, local):
    """Five prompts over two ranks, weights sharded in halves, everything not in use offloaded."""
    assert len(rows(together)) == STEPS
    for ours, theirs in zip(rows(together), rows(local), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_two_workers_that_share_every_row_are_one_to_rounding(run, local):
    """No token is counted twice."""
    shared = run("shared", TOGETHER, "sharding.sequence_parallel=2")
    for ours, theirs in zip(rows(shared), rows(local), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_pools_apart_are_one_pool_to_the_bit(run, together):
    apart = run("apart", APART)
    assert written(apart) == written(together)
    assert rows(apart) == rows(together)


@pytest.mark.parametrize("lora", ["null", "{rank: 4, alpha: 8}"])
def test_bf16_is_one_recipe_in_every_placement(run, lora):
    """A step with a reference: identical samples, and the numbers of one device up to bf16 rounding of reordered sums.
    With LoRA, the reference is the model with LoRA disabled, which is a sharded model's first forward pass."""
    settings = ["model.precision=bf16", f"model.lora={lora}", "train.steps=1", "train.save_every=0"]
    names = [f"{place} bf16 {len(lora)}" for place in ("local", "two")]
    one, two = (run(name, place, *settings) for name, place in zip(names, ("placement.kind=local", TWO), strict=True))
    texts = [[json.loads(line)["response"] for line in (one / "samples.jsonl").open()] for one in (one, two)]
    assert texts[0] == texts[1]
    (ours,), (theirs,) = rows(one), rows(two)
    assert ours["mismatch/mean"] < 0.02 and theirs["mismatch/mean"] < 0.02
    assert {name for name in ours if ours[name] != pytest.approx(theirs[name], rel=0.02, abs=5e-3)} <= {"mismatch/max"}
    weights = [tensors(one / "checkpoints" / "step_000001" / "model") for one in (one, two)]
    assert {tensor.dtype for each in weights for tensor in each.values()} == {torch.float32}


def test_a_run_goes_on_in_another_placement(run, together, local):
    """After step 2: of two ranks in two others, bitwise; up to rounding of two in this process, of this process on two, and of
    four that are two replicas sharing every row on three."""
    expected = written(together)
    shared = "sharding={replicas: 2, sequence_parallel: 2}"
    replicas = run("replicas", "placement={kind: ray, devices: 4}", shared, "train.steps=2")
    moves = {
        "again": (together, TWO), "alone": (together, "placement.kind=local"), "spread": (local, TWO),
        "three": (replicas, "placement={kind: ray, devices: 3}"),
    }  # fmt: skip
    for name, (before, placed) in moves.items():
        folder = together.parent / name
        shutil.copytree(before, folder)
        (folder / "checkpoints" / "latest").write_text("step_000002")
        run(name, placed, "--resume")
        assert written(folder) == expected or name != "again"
        assert rows(folder)[-1] == pytest.approx(rows(local)[-1], rel=1e-4, abs=1e-5)


def workers():
    """Worker processes of this run's pools."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child] if "ray::Process" in " ".join(child.cmdline()) else []
    return found


def killing(response, answer, fields):
    """Kills a worker of this run while the fourth step is scored, once."""
    global calls
    calls += 1
    if calls == KILLED_AT:
        workers()[0].kill()
        time.sleep(1)
    return graded(response, answer, fields)


def test_a_run_whose_worker_was_killed_goes_on_from_its_checkpoint(run, together, capsys, monkeypatch):
    """Killed in step 3, after the checkpoint of step 2: the restarted run equals an uninterrupted one."""
    monkeypatch.setattr(importlib.import_module("test_placement"), "calls", 0, raising=False)
    placed = f"placement={{kind: ray, devices: 2, max_restarts: 1, {EVERYTHING_AWAY}}}"
    folder = run("killed", placed, "reward.0.name=test_placement.killing")
    assert "restarting from step_000002, 0 restarts are left" in capsys.readouterr().out
    assert written(folder)[1] == written(together)[1]
    assert [line["step"] for line in rows(folder)] == [1, 2, 3]


def test_without_restarts_the_run_ends_with_the_name_of_the_worker_that_was_killed(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("test_placement"), "calls", 0, raising=False)
    folder = run("ended", TWO, "reward.0.name=test_placement.killing", status=1)
    died = r"rlcore: worker \d of 2 \(pid \d+ on [\d.]+\) died in `\w+`: killed .* --resume"
    assert re.match(died, capsys.readouterr().err.splitlines()[-1])
    limit = time.monotonic() + 20
    while workers():
        assert time.monotonic() < limit, workers()
        time.sleep(0.1)
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_000002"


def test_memory_of_each_phase_is_what_the_phase_needs(together, local):
    """In units of the weights: float32 weights, two moments and the gradient make four."""
    last = json.loads((together / "metrics.jsonl").read_text().splitlines()[-1])
    whole = json.loads((local / "metrics.jsonl").read_text().splitlines()[-1])
    weights = last["memory/infer"]  # the sampler's own full copy
    assert last["memory/reference"] == pytest.approx(weights / 2, rel=0.01)
    assert last["memory/reshard"] == pytest.approx(1.5 * weights, rel=0.01)
    assert last["memory/train"] == pytest.approx(2 * weights, rel=0.01)
    assert whole["memory/train"] == pytest.approx((4 + 1 + 1) * weights, rel=0.01), "nothing parked: sampler and reference too"


def slow(response, answer, fields):
    time.sleep(0.05)
    return graded(response, answer, fields)


def test_rewards_and_reference_take_their_time_beside_others(run):
    """Rewards run in three other processes; a reference on its own device runs in parallel with the actor."""
    pools = "{train: {roles: [actor, rollout]}, fixed: {roles: [reference]}}"
    placed = f"placement={{kind: ray, reward_workers: 3, pools: {pools}}}"
    folder = run("beside", placed, "reward.0.name=test_placement.slow", "train.epochs_per_step=2")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    slowest = CALLS * 0.05 / 5 * 2  # of three workers, one has two groups of five
    assert lines[-1]["timing/reward"] == pytest.approx(slowest, rel=0.2)
    beside = [line["timing/reference_model"] - line["timing/non_overlap_reference_model"] for line in lines]
    assert max(beside) > 0, "tens of milliseconds each: on a loaded machine a step's may miss each other, not all three"


AHEAD = (
    "placement={kind: ray, max_staleness: 1, pools: {train: {roles: [actor, reference]}, sample: {roles: [rollout]}}}",
    "algorithm.correction=token_tis", "reward.0.name=test_placement.slow", "train.save_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def ahead(run):
    return run("ahead", *AHEAD)


def test_sampling_ahead_is_one_version_behind_and_no_more(ahead):
    folder = ahead
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/staleness"] for line in lines] == [0, 1, 1]
    versions = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {(line["step"], line["policy_version"]) for line in versions} == {(1, 0), (2, 0), (3, 1)}
    assert lines[1]["mismatch/mean"] > 100 * lines[0]["mismatch/mean"]
    for line in lines:
        assert 1 <= line["timing/reward"] / (CALLS * 0.05) < 1.9, "of its own samples, once, whenever they were scored"
        assert line["timing/rollout"] > 0 and line["vllm_tps"] > line["decode_tps"] > 0


def test_what_was_sampled_ahead_is_trained_after_a_resumption(run, ahead):
    """Step 2's samples, of the policy before step 1, are in the checkpoint of step 1; step 3's are sampled after it."""
    folder = ahead.parent / "ahead again"
    shutil.copytree(ahead, folder)
    (folder / "checkpoints" / "latest").write_text("step_000001")
    run(folder.name, *AHEAD, "--resume")
    assert written(folder) == written(ahead)
    assert rows(folder) == rows(ahead)
    assert not (folder / "checkpoints" / f"step_{STEPS:06d}" / "sampled.safetensors").exists(), "no step is left to train"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("placement={kind: ray, devices: 400}", "placement.devices: 400 devices of 1 CPU are more than the cluster has"),
        ("placement={devices: 2}", "placement.kind: local is one process on one device; set placement.kind=ray"),
        ("placement={kind: ray, devices: 3}", "3 devices cannot be split into equal parts of 2 (rollout.tensor_parallel)"),
        ("placement={kind: ray, max_staleness: 1}", "max_staleness: 1 needs actor and rollout in different pools"),
        ("placement={kind: ray, pools: {a: {roles: [actor]}}}", "no pool has the role rollout"),
        ("placement.reward_workers=2", "placement.reward_workers: 2 need placement.kind=ray"),
        ("placement={kind: rey}", "placement.kind: none of the installed placements is called 'rey'; did you mean 'ray'?"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(run, capsys, setting, message):
    folder = run("refused", setting, *(["rollout.tensor_parallel=2"] if "devices: 3" in setting else []), status=2)
    assert message in capsys.readouterr().err
    assert not folder.exists()


# metrics over workers


class Threaded:
    """A worker in this process whose calls run in a thread of their own, as a Ray actor's do."""

    def __init__(self, worker):
        self.worker, self.thread = worker, ThreadPoolExecutor(1)

    def call(self, method, *args, **kwargs):
        return self.thread.submit(lambda: getattr(self.worker, method.__name__)(*args, **kwargs))

    def stream(self, method, *args, **kwargs):
        started = self.thread.submit(lambda: list(getattr(self.worker, method.__name__)(*args, **kwargs)))
        return (item for _ in range(1) for item in started.result())


class Slow:
    """A role whose calls take a known time."""

    version = 0

    def __init__(self, seconds):
        self.seconds = seconds

    def _take(self, what):
        time.sleep(self.seconds[what])

    def stream(self, prompts, sampling):
        self._take("rollout")
        return iter(())

    def weights(self):
        self._take("gather")
        return iter(())

    def load_weights(self, weights, version):
        list(weights)
        self._take("load")
        return Receipt(version, 0, 0, self.seconds["load"], 0.0)

    def pause(self):
        self._take("pause")

    def resume(self):
        self._take("resume")

    def device_bytes(self):
        return 0


def test_known_durations_and_skew_come_back(tiny_llama, backend):
    """Two workers of different speed: a stage takes as long as its slower worker, not their difference."""
    config = RunConfig.model_validate({
        "model": {"path": str(tiny_llama), "precision": "fp32"}, "data": {"train": {"name": "arithmetic"}},
        "placement": {"kind": "ray", "devices": 2, "offload": ["engine", "parameters"]},
    })  # fmt: skip
    names = ("rollout", "gather", "load", "pause", "resume")
    members = []
    for seconds in ((0.3, 0.2, 0.1, 0.05, 0.06), (0.5, 0.1, 0.1, 0.02, 0.08)):
        worker = Worker(ResolvedModel(config, backend))
        worker.rollout = worker.actor = Slow(dict(zip(names, seconds, strict=True)))
        worker.memory_manager.register("engine", worker.rollout)
        worker.memory_manager.register("parameters", Slow({"pause": 0.04, "resume": 0.07}))
        members.append(Threaded(worker))
    placement = Placement(config, dict.fromkeys(ROLES, Pool(members)))
    started = time.perf_counter()
    placement.sync_weights()
    list(placement.rollout.stream([Prompt(Row("a", []), [1], [1])] * 2, Sampling(1, 1)))
    timing = timings(placement.spans(), started, time.perf_counter())
    assert timing["timing/rollout"] == pytest.approx(0.5, rel=0.05)
    assert timing["timing/resharding_to_infer"] == pytest.approx(max(0.2 + 0.1, 0.1 + 0.1) + 0.04, rel=0.05)
    assert timing["timing/all"] == pytest.approx(0.3 + 0.04 + 0.5, rel=0.05)
    assert timing["timing/other"] < 0.05 * timing["timing/all"]
    for member in members:
        with member.worker.memory_manager.phase("score"):
            pass
    timing = timings(placement.spans(), started, time.perf_counter())
    assert timing["timing/resharding_to_train"] == pytest.approx(0.05 + 0.07, rel=0.05)


class Drawn:
    """A worker's sampler that finishes groups in reverse order."""

    def __init__(self, worker):
        self.worker = worker

    def generate(self, *arguments):
        return iter(reversed(list(self.worker.generate(*arguments))))


def resolved_of(folder, backend, **sections):
    return ResolvedModel(RunConfig.model_validate(settings(folder, **sections)), backend)


def test_several_engines_draw_what_one_draws_and_in_its_order(tiny_llama, backend):
    resolved = resolved_of(tiny_llama, backend)
    workers = [Worker(resolved) for _ in range(2)]
    for worker in workers:
        worker.start_engine()
    prompts = first_prompts(resolved, 5)
    alone = workers[0].rollout.generate(prompts, Sampling(2, 6, seed=3))
    groups = PooledRollout(Pool([Threaded(Drawn(worker)) for worker in workers]), 1).generate(prompts, Sampling(2, 6, seed=3))
    assert [group.prompt for group in groups] == prompts
    drawn = [[sample.token_ids.tolist() for group in each for sample in group.samples] for each in (groups, alone)]
    assert drawn[0] == drawn[1]


def test_an_update_is_served_before_anything_more_is_sampled(tiny_llama, backend):
    resolved = resolved_of(tiny_llama, backend, model={"path": str(tiny_llama), "precision": "fp32"}, optimizer={"lr": 0.1})
    with placement.local(resolved, Watchdog(0, Path())) as run:
        run.load("grpo")
        run.start_engines()
        prompts, before = first_prompts(resolved, 2), []
        for version in (0, 1, 2):
            assert run.sync_weights().version == version
            batch = Batch.of(run.rollout.generate(prompts, Sampling(4, 6, seed=1)))
            assert {sample.policy_version for sample in batch.samples} == {version}
            assert (run.actor.logprobs(batch) - batch.rollout_logprobs).abs().max() < 1e-3, version
            advantages = torch.linspace(-1, 1, len(batch.loss_mask))
            run.update(replace(batch, advantages=advantages))
            before.append(batch.rollout_logprobs)
        assert before[0].shape != before[1].shape or (before[0] - before[1]).abs().max() > 1e-2, "the policy has changed"


class Elsewhere:
    """A worker whose clock is far ahead and which was busy for the last second."""

    AHEAD = 1000.0

    def now(self):
        return time.perf_counter() + self.AHEAD

    def spans(self):
        return [Span("update", self.now() - 1, self.now())]


def test_spans_of_a_worker_with_another_clock_are_on_this_one(tiny_llama, backend):
    resolved = resolved_of(tiny_llama, backend)
    run = Placement(resolved.config, dict.fromkeys(ROLES, Pool([Threaded(Elsewhere()), Threaded(Worker(resolved))])))
    (span,) = run.spans()
    assert span.worker == 1 and span.end == pytest.approx(time.perf_counter(), abs=0.5)
    assert span.end - span.start == pytest.approx(1, abs=0.1)


def one_update(folder, backend, **sections):
    """A local run, and a batch whose update changes every weight."""
    exact = {"model": {"path": str(folder), "precision": "fp32"}, "optimizer": {"lr": 0.1}}
    resolved = resolved_of(folder, backend, **exact, **sections)
    run = placement.local(resolved, Watchdog(0, Path()))
    run.load("grpo")
    run.start_engines()
    run.sync_weights()
    batch = Batch.of(run.rollout.generate(first_prompts(resolved, 2), Sampling(4, 6, seed=1)))
    return run, replace(batch, advantages=torch.linspace(-1, 1, len(batch.loss_mask)))


def test_the_reference_stays_what_the_run_began_with(tiny_llama, backend):
    run, batch = one_update(tiny_llama, backend, algorithm={"group_size": 4, "kl_coef": 0.1})
    before = run.reference.logprobs(batch)
    assert torch.equal(before, run.actor.logprobs(batch))
    run.update(replace(batch, ref_logprobs=before))
    assert torch.equal(run.reference.logprobs(batch), before)
    assert (run.actor.logprobs(batch) - before).abs().max() > 1e-2


def test_the_memory_of_an_update_counts_its_gradients(tiny_llama, backend):
    run, batch = one_update(tiny_llama, backend)
    run.memory()
    run.update(batch)
    weights = sum(weight.nbytes for weight in run.pools[0].members[0].worker.actor.model.parameters()) / 2**30
    engine = run.pools[0].members[0].worker.rollout.device_bytes() / 2**30
    assert run.memory()["memory/train"] == pytest.approx(engine + 3 * weights, rel=1e-3), "moments are made when gradients go"
    run.update(batch)
    assert run.memory()["memory/train"] == pytest.approx(engine + 4 * weights, rel=1e-3)


def test_memory_is_that_of_the_worker_that_holds_most(tiny_llama, backend):
    resolved, members = resolved_of(tiny_llama, backend), []
    for size in (2**32, 2**30):
        worker = Worker(resolved)
        worker.memory_manager.note("train", extra=size)
        members.append(Threaded(worker))
    everyone = Placement(resolved.config, dict.fromkeys(ROLES, Pool(members)))
    assert everyone.memory()["memory/train"] == 4


def test_an_error_in_a_worker_is_the_same_error_here(tiny_llama, cluster):
    import ray
    from rlcore_backends.ray.pools import Process, Remote
    from rlcore_backends.ray.store import RayStore

    config = RunConfig.model_validate(settings(tiny_llama, reward=[{"name": "mth"}]))
    process = ray.remote(Process).options(num_cpus=0).remote()
    try:
        with pytest.raises(PluginError, match="'mth'") as raised:
            Remote(process, "a worker", RayStore()).ask(Process.open_rewards, config, []).result()
        assert raised.type is PluginError, "and none of Ray's that is one too"
    finally:
        ray.kill(process)


def test_workers_compute_in_the_precision_that_was_chosen_here(tiny_llama, backend, cluster, monkeypatch):
    """`auto` would choose another precision on this CPU than on theirs."""
    other = {"fp32": "bf16", "bf16": "fp32"}[backend.default_precision()]
    with monkeypatch.context() as patch:
        patch.setattr(type(backend), "default_precision", lambda self: other)
        resolved = resolved_of(tiny_llama, backend, model={"path": str(tiny_llama)}, placement={"kind": "ray"})
    with registry.load("placements", "ray")(resolved, Watchdog(0, Path())) as there:
        there.load("grpo")
        there.start_engines()
        receipt = there.sync_weights()
    numbers = sum(weight.numel() for weight in resolved.load(resolved.folder).parameters())
    assert receipt.bytes == numbers * {"fp32": 4, "bf16": 2}[other]


def test_streams_are_merged_as_they_come_and_an_error_ends_them():
    def slow(values, error=None):
        for value in values:
            time.sleep(0.02)
            yield value
        if error:
            raise error

    assert sorted(merged([slow([1, 2]), slow([3, 4]), slow([])])) == [1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        list(merged([slow([1], ZeroDivisionError()), slow(range(50))]))
