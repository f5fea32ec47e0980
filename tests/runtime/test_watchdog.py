"""How a hanging run is ended and reported: real processes that sleep, spin, stop and die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import yaml
from ray_jobs import Job

from rlcore.cli.main import main
from rlcore.errors import WorkerDied
from rlcore.monitor.heartbeat import Condition, Heartbeat, ProcessHandle, Progress, observe
from rlcore.runtime.pool import results
from rlcore.runtime.watchdog import Report, Stillness

HANG = '''
import re, sys, time
from pathlib import Path
from rlcore.errors import RunError
from rlcore.monitor.heartbeat import publish
from rlcore.runtime.watchdog import Watchdog

def sleeps():
    try:
        time.sleep(100)
    except Exception:
        print("forgiven")

def never_lets_go():
    re.match("(a+)+$", 40 * "a" + "b")

def stubborn():
    while True:
        try:
            time.sleep(100)
        except BaseException:
            pass

def looked_at():
    breakpoint()

def slow_but_moving():
    for _ in range(30):
        time.sleep(0.1)
        watchdog.heartbeat.beat()
'''
RUN = HANG + '''
limit, what, folder = float(sys.argv[1]), globals()[sys.argv[2]], Path(sys.argv[3])
try:
    with Watchdog(limit, folder, grace=2.0) as watchdog, watchdog.heartbeat.stage("reward"):
        what()
except RunError as error:
    print(error)
    sys.exit(error.status)
'''
SHOW = HANG + '''
heartbeat, place = publish("worker 1", "here")
with heartbeat.stage("update"):
    heartbeat.beat()
    print(place.pid, place.heartbeat, place.stacks, flush=True)
    globals()[sys.argv[1]]()
'''


def run(limit, what, folder, typed=None):
    """Run only this; returns status, output, stderr and duration."""
    program = [sys.executable, "-c", RUN, str(limit), what, str(folder)]
    environment = os.environ | {"PYTHONBREAKPOINT": ""}  # child processes inherit the one Ray sets
    began = time.monotonic()
    with subprocess.Popen(program, stdin=-1, stdout=-1, stderr=-1, text=True, env=environment) as process:
        if typed:
            time.sleep(limit + 2)
        out, said = process.communicate(typed, timeout=60)
    return process.returncode, out, said, time.monotonic() - began


@pytest.fixture
def worker():
    """Start a process that publishes its heartbeat and does this; returns the process and its place."""
    with contextlib.ExitStack() as stack:

        def start(what):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", SHOW, what], stdout=-1, text=True))
            stack.callback(process.kill)
            pid, heartbeat, stacks = (int(number) for number in process.stdout.readline().split())
            time.sleep(0.2)  # let it get going
            return process, ProcessHandle("worker 1", "here", pid, heartbeat, stacks)

        yield start


# ending a run


def test_a_run_that_hangs_ends_with_a_report_of_where(tmp_path):
    status, out, said, seconds = run(1, "sleeps", tmp_path)
    (report,) = tmp_path.glob("stall-*.txt")
    assert status == 1 and seconds < 5
    doing = r"in reward for \d s, at sleeps \(<string>:10\)"
    headline = rf"nothing has moved for 1 s \(placement.stall_seconds\); the controller is {doing}"
    assert re.fullmatch(rf"{headline}; every stack: {report}\n", out)
    assert re.fullmatch(rf"  controller, pid \d+ on \S+: {doing}\n", said)
    assert 'File "<string>", line 10 in sleeps' in report.read_text(encoding="utf-8")


def test_what_forgives_errors_does_not_forgive_a_stall(tmp_path):
    assert "forgiven" not in run(1, "sleeps", tmp_path)[1]


def test_a_run_without_a_folder_yet_says_everything_on_stderr(tmp_path):
    status, _, said, _ = run(1, "sleeps", tmp_path / "missing")
    assert status == 1 and 'File "<string>", line 10 in sleeps' in said
    assert not (tmp_path / "missing").exists()


def test_code_that_never_lets_go_of_the_interpreter_ends_too(tmp_path):
    status, _, said, seconds = run(1, "never_lets_go", tmp_path)
    assert status == 1 and seconds < 8
    assert said.startswith("Timeout (0:00:03") and "in never_lets_go" in said


def test_a_run_that_does_not_end_when_told_is_killed(tmp_path):
    status, _, said, seconds = run(1, "stubborn", tmp_path)
    assert status == 1 and seconds < 8
    assert said.endswith("rlcore: killed, as it did not end in 2 s\n")


def test_a_run_that_moves_is_left_alone_however_long_a_stage_takes(tmp_path):
    status, _, said, seconds = run(1, "slow_but_moving", tmp_path)
    assert (status, said) == (0, "") and seconds > 3


def test_a_run_in_a_debugger_is_left_alone(tmp_path):
    status, out, *_ = run(1, "looked_at", tmp_path, typed="continue\n")
    assert status == 0, out
    assert not list(tmp_path.iterdir())


def test_no_limit_is_no_watch(tmp_path):
    assert run(0, "slow_but_moving", tmp_path)[0] == 0


def test_a_reward_that_hangs_ends_the_run_it_is_in(tmp_path, tiny_llama, capsys):
    settings = {
        "model": {"path": str(tiny_llama), "precision": "fp32"}, "backend": {"options": {"threads": 1}},
        "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64}, "rollout": {"engine": "torch", "max_new_tokens": 2},
        "reward": [{"name": f"{__name__}.hangs"}], "placement": {"stall_seconds": 2.0},
        "train": {"prompts_per_step": 1, "max_tokens_per_microbatch": 256}, "logging": {"tensorboard": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["grpo", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]) == 1
    *_, headline = capsys.readouterr().err.splitlines()
    assert headline.startswith("rlcore: nothing has moved for 2 s (placement.stall_seconds); the controller is in reward for ")
    assert re.search(r"at hangs \(test_watchdog\.py:\d+\); every stack: .*/run/stall-.*\.txt$", headline)


def hangs(response, answer, fields):
    time.sleep(60)


# observing a worker


def test_a_worker_shows_its_progress_and_its_stacks(worker):
    _, handle = worker("sleeps")
    seen = observe(handle, with_stacks=True)
    assert (seen.who, seen.where, seen.trouble) == ("worker 1", f"pid {handle.pid} on here", "")
    assert (seen.progress.stage, seen.progress.beats) == ("update", 3)
    assert 0 < seen.progress.moved <= seen.progress.began < 10
    assert 'File "<string>", line 10 in sleeps' in seen.stacks


def test_each_look_has_the_stacks_of_its_own_moment(worker):
    _, handle = worker("sleeps")
    assert [observe(handle, with_stacks=True).stacks.count("in sleeps") for _ in range(2)] == [1, 1]


def test_looking_without_stacks_costs_the_worker_nothing(worker):
    process, handle = worker("sleeps")
    assert observe(handle, with_stacks=False).stacks == ""
    assert os.stat(f"/proc/{process.pid}/fd/{handle.stacks}").st_size == 0


def test_a_worker_that_never_lets_go_of_the_interpreter_shows_its_stacks_all_the_same(worker):
    _, handle = worker("never_lets_go")
    assert "in never_lets_go" in observe(handle, with_stacks=True).stacks


def test_a_worker_that_is_stopped_is_said_to_be(worker):
    process, handle = worker("sleeps")
    process.send_signal(signal.SIGSTOP)
    seen = observe(handle, with_stacks=True)
    assert seen.progress.stage == "update" and seen.stacks == ""
    assert seen.trouble == f"shows no stacks for 5 s: its process is stopped; py-spy dump --pid {handle.pid}"


def test_a_worker_that_is_gone_is_said_to_be(worker):
    process, handle = worker("sleeps")
    process.kill()
    process.wait()
    where = f"pid {handle.pid} on here"
    assert observe(handle, with_stacks=True) == Condition("worker 1", where, trouble="its process is gone")


def test_stages_may_overlap():
    heartbeat = Heartbeat()
    with heartbeat.stage("rollout"):
        with heartbeat.stage("reward"):
            assert heartbeat.progress().stage == "rollout, reward"
        assert heartbeat.progress().stage == "rollout"
    assert heartbeat.progress().stage == "" and heartbeat.progress().beats == 5


# interpreting the observations


def seen(who, beats=1, stage="update", *frames, trouble=""):
    """`frames`: FILE:FUNCTION, innermost first."""
    text = "".join('  File "{}", line 7 in {}\n'.format(*frame.split(":")) for frame in frames)
    stacks = f"Thread 0x01 (most recent call first):\n{text}" if frames else ""
    return Condition(who, "pid 1 on n", Progress(stage, 30.0, 30.0, beats) if beats else None, stacks, trouble)


TORCH = "/site-packages/torch"
ALL_REDUCE = (f"{TORCH}/distributed/distributed_c10d.py:all_reduce", "/mine.py:step")
WAIT_TENSOR = (f"{TORCH}/_ops.py:__call__", f"{TORCH}/distributed/_functional_collectives.py:wait_tensor", "/mine.py:step")
IN_A_HOOK = ("/mine.py:forward", f"{TORCH}/nn/modules/module.py:_call_impl", f"{TORCH}/distributed/fsdp/state.py:pre_forward")
WAITING = seen("controller", 1, "", "/lib/python3/threading.py:wait", "/rlcore/placement.py:results")


def sentence(*workers):
    return Report(30.0, [WAITING, *workers]).waits


@pytest.mark.parametrize("collective", [ALL_REDUCE, WAIT_TENSOR])
def test_workers_in_a_collective_wait_for_the_one_that_is_not(collective):
    others = [seen(f"worker {rank}", 1, "update", *collective) for rank in (0, 1)]
    assert sentence(*others, seen("worker 2", 1, "update", *IN_A_HOOK)) == (
        "worker 0, worker 1 wait in a collective for worker 2 (in update for 30 s, at forward (mine.py:7))"
    )


def test_workers_in_a_collective_wait_for_the_one_that_has_answered():
    said = sentence(seen("worker 0", 1, "update", *ALL_REDUCE), seen("worker 1", 1, ""))
    assert said == "worker 0 waits in a collective for worker 1 (idle for 30 s)"


def test_workers_that_are_all_in_a_collective_are_told_apart_from_those_that_miss_one():
    both = [seen(f"worker {rank}", 1, "update", *ALL_REDUCE) for rank in (0, 1)]
    assert sentence(*both) == "worker 0, worker 1 wait in a collective, and no worker is outside"


def test_the_controller_waits_for_the_workers_that_have_not_answered():
    said = sentence(seen("worker 0", 1, ""), seen("worker 1", 1, "rollout", "/mine.py:loop"))
    assert said == "the controller waits for worker 1 (in rollout for 30 s, at loop (mine.py:7))"


def test_the_controller_waits_for_a_worker_of_which_nothing_is_known():
    said = sentence(seen("worker 0", 1, ""), seen("worker 1", 0, trouble="its node does not answer"))
    assert said == "the controller waits for worker 1 (its node does not answer)"


def test_where_every_worker_has_answered_the_controller_is_what_hangs():
    assert sentence(seen("worker 0", 1, "")) == "the controller is idle for 30 s, at results (placement.py:7)"


def test_stillness_is_the_time_since_any_process_moved():
    still = Stillness(100.0)
    assert still.seconds([seen("a", 5), seen("b", 5)], 101.0) == 0, "seen for the first time"
    assert still.seconds([seen("a", 5), seen("b", 5)], 104.0) == 3
    assert still.seconds([seen("a", 5), seen("b", 6)], 105.0) == 0
    assert still.seconds([seen("a", 5), seen("b", 0)], 107.0) == 2, "nothing known of it is no movement"
    assert still.seconds([seen("a", 5), seen("b", 6)], 108.0) == 3, "and neither is what was known before"


def test_of_a_death_and_what_it_broke_in_the_others_the_death_is_told():
    broken, dead, waiting = Future(), Future(), Future()
    broken.set_exception(RuntimeError("connection closed by peer"))
    threading.Timer(0.3, dead.set_exception, [WorkerDied("worker 1 died")]).start()
    threading.Timer(0.6, waiting.set_exception, [RuntimeError("connection closed by peer")]).start()
    with pytest.raises(WorkerDied, match="worker 1 died"):
        results([broken, dead, waiting])


# on Ray


@pytest.mark.parametrize(("said", "told"), [
    ("The actor died because its node has died. Node Id: 5f", "its node has left the cluster: switched off, cut off, or its"),
    ("The actor died. Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of file.",
     r"killed \(for want of memory, if dmesg on that node says so\) or crashed"),
    ("The actor died. Worker exit detail: Worker exits by an user request. exit_actor()", "Worker exits by an user request"),
])  # fmt: skip
def test_a_death_is_told_by_its_cause(ray, said, told):
    from ray.exceptions import RayActorError
    from rlcore_backends.ray.observers import died

    error = died("worker 1 of 2", "pid 7 on n", "update", RayActorError(error_msg=said))
    assert re.match(rf"worker 1 of 2 \(pid 7 on n\) died in `update`: {told}", str(error)), str(error)
    assert isinstance(error, WorkerDied) and str(error).endswith("goes on from the last checkpoint")


def test_a_node_that_does_not_answer_is_said_not_to(cluster, worker, monkeypatch):
    import ray
    from rlcore_backends.ray import observers as ray_observers

    monkeypatch.setattr(ray_observers, "PATIENCE", 1.0)
    process, handle = worker("sleeps")
    observers = ray_observers.Observers()
    observers.add(ray.get_runtime_context().get_node_id(), handle)
    try:
        limit = time.monotonic() + 60  # wait until its observer has started
        while observers.look(with_stacks=False)[0].trouble and time.monotonic() < limit:
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)  # a stack request then blocks longer than the observer's timeout
        began = time.monotonic()
        (seen,) = observers.look(with_stacks=True)
        assert seen.trouble.startswith("its node has not answered for 1 s") and time.monotonic() - began < 3
    finally:
        observers.close()
    assert observers.look(with_stacks=True) == [], "none after it is closed"


PAIR = '''
import re, sys
from pathlib import Path
import ray, torch
from rlcore.errors import RunError
from rlcore.runtime.pool import results
from rlcore.monitor.heartbeat import publish
from rlcore.runtime.watchdog import Watchdog
from rlcore_backends.ray.observers import Observers

@ray.remote
class Worker:
    def show(self, rank, file):
        torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
        self.heartbeat, place = publish(f"worker {rank}", ray.util.get_node_ip_address())
        return ray.get_runtime_context().get_node_id(), place

    def update(self, rank):
        with self.heartbeat.stage("update"):
            if rank == 1:
                never_lets_go()
            torch.distributed.all_reduce(torch.ones(1))

def never_lets_go():
    re.match("(a+)+$", 40 * "a" + "b")

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
workers, folder, observers = [Worker.remote() for _ in range(2)], Path(sys.argv[1]), Observers()
for node, place in ray.get([worker.show.remote(rank, folder / "meeting") for rank, worker in enumerate(workers)]):
    observers.add(node, place)
try:
    with Watchdog(4.0, folder) as watchdog:
        watchdog.workers = observers.look
        try:
            results([worker.update.remote(rank).future() for rank, worker in enumerate(workers)])
        finally:
            observers.close()
            ray.shutdown()
except RunError as error:
    print(error, flush=True)
    sys.exit(error.status)
'''


@pytest.fixture
def ray():
    pytest.importorskip("ray", reason="needs requirements/ray.txt")


def test_a_collective_that_one_worker_never_joins_ends_in_a_report_that_names_it(tmp_path, ray):
    (tmp_path / "pair.py").write_text(PAIR, encoding="utf-8")
    with Job(tmp_path / "pair.py", tmp_path) as job:
        job.line("^  controller, ")
        began = time.monotonic()
        said = job.line("^nothing has moved.*").group()
        assert job.end() == 1 and time.monotonic() - began < 20
    report = next(tmp_path.glob("stall-*.txt")).read_text(encoding="utf-8")
    assert "; worker 0 waits in a collective for worker 1 (in update for " in said and "at never_lets_go (pair.py:" in said
    parts = {part.split(",")[0]: part for part in report.split("\n== ")[1:]}
    assert list(parts) == ["controller", "worker 0", "worker 1"]
    assert "in all_reduce" in parts["worker 0"] and "in never_lets_go" in parts["worker 1"]
