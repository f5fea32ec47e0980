"""A run whose memory runs out, in this process and in workers: real allocations that fail in a stage of a step."""

from __future__ import annotations

import functools
import json
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from run_files import ARITHMETIC, settings
from weight_models import tensors

from rlcore.cli.main import main
from rlcore.config.schema import RunConfig
from rlcore.errors import OutOfMemory
from rlcore.model.actor import TorchActor
from rlcore.model.reference import TorchReference
from rlcore.model.resolved import ResolvedModel
from rlcore.rollout.sampler import TorchRollout
from rlcore.runtime.memory import OffloadedTensors
from rlcore.runtime.placement import Placement
from rlcore.runtime.reward_worker import RewardWorker
from rlcore.runtime.shortage import recognized
from rlcore.runtime.worker import Worker

CALL = 3  # of a stage's calls, the one that fails
TOO_MUCH = 2**50
SAID = r"DefaultCPUAllocator: can't allocate memory: you tried to allocate \d+ bytes"


def graded(response, answer, fields):
    return len(set(response)) / 10


def too_much():
    return torch.empty(TOO_MUCH, dtype=torch.uint8)


@pytest.fixture
def run(tmp_path, tiny_llama, capsys, monkeypatch):
    """Run the command; returns its exit status, stderr and run folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    values = settings(
        tiny_llama, reward=[{"name": "test_shortage.graded"}], optimizer={"lr": 1e-3},
        train={"steps": 4, "prompts_per_step": 2, "max_tokens_per_microbatch": 68},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def start(*overrides, name="run"):
        capsys.readouterr()
        status = main(["grpo", str(tmp_path / "run.yaml"), *overrides, "--run-dir", str(tmp_path / name)])
        return status, capsys.readouterr().err, tmp_path / name

    return start


def failing(monkeypatch, kind, method, call=CALL):
    """Let this call of a method of a class fail for want of memory."""
    real, calls = getattr(kind, method), []

    @functools.wraps(real)
    def failed(*arguments, **options):
        calls.append(method)
        if len(calls) == call:
            too_much()
        return real(*arguments, **options)

    monkeypatch.setattr(kind, method, failed)


def failing_backward(monkeypatch, steps, row=0):
    """Let a backward pass fail for want of memory: that of this micro-batch, after so many optimizer steps."""
    real = TorchActor._losses

    def losses(self, batch):
        for number, (index, result) in enumerate(real(self, batch)):
            if number == row and self.learner.steps == steps:
                result.loss.register_hook(lambda gradient: too_much())
            yield index, result

    monkeypatch.setattr(TorchActor, "_losses", losses)


def model(folder, step):
    return tensors(folder / "checkpoints" / f"step_{step:06d}" / "model")


# in this process


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_runs_out_is_told_saved_and_gone_on_with(run, monkeypatch, precision):
    """The second of a step's backward passes fails: gradients and working copies are half-done. The run goes on as advised, and
    ends as one that never failed."""
    steps = "train.steps=3"
    _, _, whole = run(steps, f"model.precision={precision}", "train.save_every=1", name="whole")
    with monkeypatch.context() as patch:
        failing_backward(patch, steps=2, row=1)
        status, said, folder = run(steps, f"model.precision={precision}")
    first, *lines = said.splitlines()
    assert status == 1 and re.match(rf"rlcore: out of host memory in `update` of step 3: {SAID}", first), said
    begun = [line.split(":")[0].strip() for line in lines]
    assert begun == ["free", "try", "then", "then", "step_000002 is saved; go on", "the traceback"]
    assert "train.gradient_checkpointing=true (now false)" in lines[1]
    written = next(folder.glob("failure-*.txt"))
    assert lines[-1].endswith(str(written)) and "in too_much" in written.read_text(encoding="utf-8")
    ours, theirs = model(folder, 2), model(whole, 2)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}, "the weights, not the copies that were in use"
    override = re.search(r"--resume (\S+)$", lines[-2])[1]
    status, said, _ = run(steps, f"model.precision={precision}", "--resume", override)
    assert status == 0, said
    ours, theirs = model(folder, 3), model(whole, 3)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


@pytest.mark.parametrize(("kind", "method", "stage", "overrides", "first"), [
    (TorchReference, "logprobs", "reference_logprobs", ("algorithm.kl_coef=0.1",), r"'model\.lora=\{rank: 16\}'"),
    (TorchRollout, "stream", "generate", (), r"rollout\.engine=vllm"),
    (TorchRollout, "load_weights", "sync", (), r"more devices: placement\.kind=ray placement\.devices=2"),
])  # fmt: skip
def test_a_stage_that_runs_out_has_the_ladder_of_its_own(run, monkeypatch, kind, method, stage, overrides, first):
    failing(monkeypatch, kind, method)
    status, said, folder = run(*overrides)
    assert status == 1
    assert re.match(rf"rlcore: out of host memory in `{stage}` of step \d: {SAID}", said), said
    assert re.search(rf"^  try:  {first} ", said, re.MULTILINE), said
    assert f"{(folder / 'checkpoints' / 'latest').read_text().strip()} is saved; " in said


def test_loading_that_runs_out_is_no_mistake_in_the_model_folder(run, monkeypatch):
    """A family reports that a folder does not load; here the folder is fine."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: too_much())
    status, said, folder = run()
    assert status == 1 and re.match(rf"rlcore: out of host memory in `load`: {SAID}", said), said
    assert "\n  start again: the same command with placement.kind=ray placement.devices=2\n" in said
    written = Path(re.search(r"the traceback: (\S+)", said)[1])
    assert not folder.exists() and "does not load" in written.read_text(encoding="utf-8")
    written.unlink()


def test_an_evaluation_that_runs_out_keeps_the_step_before_it(run, monkeypatch):
    data = f"data={{train: {json.dumps(ARITHMETIC)}, eval: {json.dumps(ARITHMETIC)}, max_prompt_tokens: 64}}"
    failing(monkeypatch, TorchRollout, "stream", call=4)  # before training, two steps, and after the second
    status, said, _ = run(data, "evaluation={every: 2, max_new_tokens: 4}")
    assert status == 1 and "in `generate` of step 2: " in said and "step_000002 is saved; go on" in said
    assert run(data, "evaluation={every: 2, max_new_tokens: 4}", "--resume")[0] == 0


def test_half_an_update_is_not_saved(run, monkeypatch):
    """Two optimizer steps a step, of which the second fails in the third: these weights are of no finished step."""
    failing_backward(monkeypatch, steps=5)
    status, said, folder = run("train.minibatches_per_step=2")
    assert status == 1 and "in `update` of step 3: " in said and "nothing is saved; start again" in said, said
    assert not (folder / "checkpoints").exists()


def test_what_fails_while_it_is_moved_to_the_host_stays_where_it_was():
    """The second of three copies fails: the first returns."""
    tensors = [torch.arange(4.0) + 10 * number for number in range(3)]
    before = [tensor.clone() for tensor in tensors]

    class Failing(OffloadedTensors):
        def _free(self, tensor):
            if tensor.data_ptr() == tensors[1].data_ptr():
                too_much()
            super()._free(tensor)

    part = Failing(lambda: tensors)
    with pytest.raises(RuntimeError, match="can't allocate"):
        part.pause()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == 3 * [16], "or to read them would crash"
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_what_a_failed_call_held_is_freed(tiny_llama, backend):
    """Though the error, which is still there, has the whole traceback."""
    held = []

    def call():
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        too_much()

    worker = Worker(ResolvedModel(RunConfig.model_validate(settings(tiny_llama)), backend))
    with pytest.raises(OutOfMemory) as raised, recognized(worker, "update", ()):
        call()
    assert "in call" in raised.value.shortage.trace and "in too_much" in raised.value.shortage.trace
    assert held[0]() is None


def test_a_worker_without_a_device_reports_its_own_error():
    with pytest.raises(MemoryError), recognized(RewardWorker({}), "score", ()):
        bytearray(2**55)


# in workers


def hungry(process, method, call, rank=None):
    """The worker process class, in which this call of a method fails for want of memory, on every rank or on one."""

    class Hungry(process):
        calls = 0

        def call(self, name, arguments):
            self._count(name)
            return super().call(name, arguments)

        def stream(self, name, arguments):
            self._count(name)
            yield from super().stream(name, arguments)

        def _count(self, name):
            import torch

            self.calls += name == method
            if name == method and self.calls == call and rank in (None, self.worker.ranks.rank):
                setattr(self.worker, name, lambda *_: torch.empty(2**50, dtype=torch.uint8))

    return Hungry


@pytest.fixture
def workers(run, cluster, monkeypatch):
    """Run on Ray workers, in which this call of a method fails."""
    from rlcore_backends.ray import pools

    def start(placement, method, *overrides, call=2, rank=None):
        with monkeypatch.context() as patch:
            patch.setattr(pools, "Process", hungry(pools.Process, method, call, rank))
            return run(f"placement={placement}", *overrides)

    return start


def test_a_worker_that_runs_out_says_which_it_is_and_saves(workers):
    status, said, folder = workers("{kind: ray}", "update")
    assert status == 1
    assert re.match(rf"rlcore: out of host memory in `update` of step 2, worker 0 of 1 \(pid \d+ on \S+\): {SAID}", said), said
    assert re.search(r"longest packed row: \d+ tokens", said)
    assert "step_000001 is saved; go on" in said and (folder / "checkpoints" / "step_000001").exists()


def test_a_rank_that_runs_out_ends_the_run_though_the_others_wait_for_it(workers):
    status, said, _ = workers("{kind: ray, devices: 2}", "update", "train.save_every=1", rank=1)
    assert status == 1
    assert re.match(r"rlcore: out of host memory in `update` of step 2, worker 1 of 2 \(pid \d+ on \S+\): ", said), said
    assert "step_000001 is saved; go on" in said
    assert re.search(r"sharding\.sequence_parallel=2 \(now 1\): .*at most 2, the devices of this pool on one node", said), said


def test_an_engine_that_runs_out_leaves_ranks_that_save(workers):
    """It asks nothing of the ranks beside it."""
    status, said, folder = workers("{kind: ray, devices: 2}", "generate", rank=1)
    assert status == 1 and "in `generate` of step 2, worker 1 of 2 (" in said
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_000001"


@pytest.mark.parametrize(("pools", "stage", "tensor_parallel", "saves"), [
    ("a", "update", 1, True),  # one device: none waits
    ("a", "sync", 1, True),
    ("aa", "generate", 1, True),
    ("aa", "generate", 2, False),  # the engine's other rank waits
    ("aa", "embed", 1, True),
    ("aa", "update", 1, False),
    ("aa", "logprobs", 1, False),
    ("aa", "reference_logprobs", 1, False),
    ("aa", "sync", 1, False),
    ("aa rr", "generate", 2, True),  # in a pool of its own
    ("a r", "receive", 1, False),  # the actor waits for it
    ("a r", "send", 1, False),
    ("aa r", "update", 1, False),
    ("aa rr ff", "reference_logprobs", 1, True),
])  # fmt: skip
def test_ranks_that_wait_for_one_that_failed_are_not_asked_to_save(pools, stage, tensor_parallel, saves):
    made = {pool[0]: SimpleNamespace(members=list(pool)) for pool in pools.split()}
    where = {"actor": "a", "rollout": "r", "vision": "r", "reference": "f"}
    placement = SimpleNamespace(
        _of={role: made.get(name, made["a"]) for role, name in where.items()},
        config=SimpleNamespace(rollout=SimpleNamespace(tensor_parallel=tensor_parallel)),
        actor=SimpleNamespace(holds=lambda steps: steps == 7),
    )
    assert Placement.can_save(placement, stage, 7) is saves
    assert not Placement.can_save(placement, stage, 6), "the actor's weights are of another step"
