"""Workers that are killed for want of host memory, by Ray and by the kernel: the run says so, with the settings to try."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from pathlib import Path

import psutil
import pytest
from ray_jobs import Job
from run_files import write

from rlcore.cli.main import main

pytest.importorskip("ray", reason="needs requirements/ray.txt")

# a worker of a Ray of its own takes memory until it is killed
TAKEN = '''
import time
import ray
from rlcore.errors import WorkerDied
from rlcore_backends.ray.pools import Process, Remote
from rlcore_backends.ray.store import RayStore

class Taking(Process):
    def take(self):
        taken = []
        for _ in range(400):
            taken.append(b"x" * (1 << 24))
            time.sleep(0.01)

ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
try:
    Remote(ray.remote(Taking).remote(), "worker 0 of 1", RayStore()).ask(Taking.take).result()
except WorkerDied as error:
    print(f"died: {error} ({error.shortage.memory})", flush=True)
finally:
    ray.shutdown()
'''


def starving(process, group):
    """The worker process class; the second update takes memory until the group's limit kills it."""

    class Starving(process):
        updates = 0

        def call(self, name, arguments):
            self.updates += name == "update"
            if self.updates == 2:
                with open(f"{group}/cgroup.procs", "w") as procs:
                    procs.write(str(os.getpid()))
                self.taken = b"x" * (1 << 30)
            return super().call(name, arguments)

    return Starving


@pytest.fixture
def group():
    """A group of processes with 128 MiB of memory for what they allocate from now on."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(root, f"rlcore-{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                (folder / limit).write_text(str(128 << 20))
                yield str(folder)
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("no memory cgroup can be made here")


def test_a_worker_that_the_kernel_killed_says_what_to_try(tmp_path, tiny_llama, cluster, group, monkeypatch, capsys):
    from rlcore_backends.ray import pools

    file = write(
        tmp_path, tiny_llama, placement={"kind": "ray"},
        train={"steps": 3, "prompts_per_step": 2, "max_tokens_per_microbatch": 256, "save_every": 1},
    )  # fmt: skip
    before = kills()
    monkeypatch.setattr(pools, "Process", starving(pools.Process, group))
    assert main(["grpo", str(file), "--run-dir", str(tmp_path / "run")]) == 1
    assert kills() == before + 1, "this test's own"
    died, *lines = capsys.readouterr().err.partition("rlcore: ")[2].splitlines()
    evidence = r"by the kernel, which has killed 1 of its node's processes since the run began"
    assert re.fullmatch(
        rf"worker 0 of 1 \(pid \d+ on \S+\) died in `update`: killed for want of host memory: {evidence}", died
    )  # fmt: skip
    assert lines[0].startswith("  try:  train.gradient_checkpointing=true (now false): ")
    onward = r"  step_000001 is saved; go on: the same command with --run-dir \S+ --resume train\.gradient_checkpointing=true"
    assert any(re.fullmatch(onward, line) for line in lines)


def test_a_worker_that_ray_killed_is_said_to_be(tmp_path):
    """Ray's limit, a gigabyte above what this machine uses now."""
    memory = psutil.virtual_memory()
    limit = f"{(memory.total - memory.available + 2**30) / memory.total:.4f}"
    (tmp_path / "taken.py").write_text(TAKEN, encoding="utf-8")
    with Job(tmp_path / "taken.py", RAY_memory_usage_threshold=limit, RAY_memory_monitor_refresh_ms="50") as job:
        said = job.line("^died: .*").group()
        assert job.end() == 0
    amount = r"[\d.]+ of [\d.]+ GB of its node's memory were in use, more than RAY_memory_usage_threshold \([\d.]+%\) allows"
    killed = rf"worker 0 of 1 \(not started\) died in `take`: killed for want of host memory: by Ray, {amount}"
    assert re.match(f"died: {killed}; .*\\(host\\)$", said), said


def kills():
    from rlcore_backends.ray.observers import kills

    return kills()


def test_a_worker_that_cannot_be_reached_is_no_killed_one():
    from ray.exceptions import ActorUnavailableError
    from rlcore_backends.ray.observers import died

    error = died("worker 1 of 2", "pid 7 on n", "update", ActorUnavailableError("rpc error 14", None), lambda: "never asked")
    assert str(error).startswith("worker 1 of 2 (pid 7 on n) died in `update`: it cannot be reached; the network to its node")
    assert error.shortage is None


def test_a_death_without_evidence_is_no_shortage():
    from ray.exceptions import RayActorError
    from rlcore_backends.ray.observers import died

    said = "The actor died. Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file."
    assert died("w", "p", "update", RayActorError(error_msg=said)).shortage is None
    shortage = died("w", "p", "update", RayActorError(error_msg=said), lambda: "by the kernel", 4).shortage
    assert shortage is not None and (shortage.stage, shortage.memory, shortage.neighbours) == ("update", "host", 4)
