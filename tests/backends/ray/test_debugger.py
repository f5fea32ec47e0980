"""Ray's distributed debugger as an editor uses it: a Debug Adapter Protocol client attaches to waiting workers."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from itertools import count
from pdb import Pdb

import pytest
import yaml
from ray_jobs import PATIENCE, Job
from rlcore_backends.ray import debugging

from rlcore.cli.main import main
from rlcore.errors import PluginError
from rlcore.monitor.heartbeat import ProcessHandle, observe
from rlcore.runtime.watchdog import Report

pytest.importorskip("ray", reason="needs requirements/ray.txt")
pytest.importorskip("debugpy", reason="needs requirements/ray.txt")

JOB = '''
import os, sys
from rlcore_backends.ray import debugging as ray_debugging
os.environ.update(ray_debugging.CONTROLLER)
import ray
from rlcore.monitor.heartbeat import publish

class Worker:
    def show(self):
        self.heartbeat, place = publish("worker", "here")
        return place.pid, place.heartbeat, place.stacks

    def multiply(self, factor):
        product = 7 * factor
        breakpoint()
        return product + 1

    def fail(self, factor):
        product = 3 * factor
        raise ValueError(f"{product} is too much")

method, workers, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
variables = ray_debugging.environment(os.environ)
os.environ.pop("RAY_DEBUG_POST_MORTEM", None)  # the node has an environment of its own
settings = ray.init(
    num_cpus=workers, include_dashboard=workers > 1, object_store_memory=80 << 20, _temp_dir=folder,
    runtime_env={"env_vars": variables},
)
print(f"dashboard {settings.dashboard_url}", flush=True)
pool = [ray.remote(num_cpus=1)(Worker).remote() for _ in range(workers)]
print("shown", *ray.get(pool[0].show.remote()), flush=True)
try:
    print("answers", ray.get([getattr(worker, method).remote(6 + rank) for rank, worker in enumerate(pool)]), flush=True)
except ValueError as error:
    print("error", repr(error.cause), flush=True)
'''


@pytest.fixture
def job(tmp_path):
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="rlcore-") as folder:  # short: holds sockets
        yield lambda method, workers, **variables: stack.enter_context(
            Job(tmp_path / "job.py", method, workers, folder, **variables)
        )


class Client:
    """Enough of the Debug Adapter Protocol to attach, inspect and continue."""

    def __init__(self, host, port):
        self.socket = socket.create_connection((host, port), timeout=PATIENCE)
        self.stream = self.socket.makefile("rb")
        self.numbers = count(1)
        self.waiting = []  # messages received while waiting for another
        self.ask("initialize", adapterID="debugpy", pathFormat="path")
        self.send("attach", justMyCode=False)
        self.take(lambda message: message.get("event") == "initialized")
        self.ask("setExceptionBreakpoints", filters=["uncaught"])
        self.ask("configurationDone")
        self.stopped = self.take(lambda message: message.get("event") == "stopped")["body"]

    def send(self, command, **arguments):
        number = next(self.numbers)
        body = json.dumps({"seq": number, "type": "request", "command": command, "arguments": arguments}).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        return number

    def ask(self, command, **arguments):
        number = self.send(command, **arguments)
        answer = self.take(lambda message: message.get("request_seq") == number)
        assert answer["success"], answer
        return answer.get("body")

    def take(self, wanted):
        for message in self.waiting:
            if wanted(message):
                self.waiting.remove(message)
                return message
        while not wanted(message := self.read()):
            self.waiting.append(message)
        return message

    def read(self):
        headers = dict(line.split(b": ") for line in iter(lambda: self.stream.readline().strip(), b""))
        return json.loads(self.stream.read(int(headers[b"Content-Length"])))

    def variables(self, function):
        """Variables in the innermost frame of `function`."""
        frames = self.ask("stackTrace", threadId=self.stopped["threadId"])["stackFrames"]
        frame = next(frame for frame in frames if frame["name"] == function)
        scope = self.ask("scopes", frameId=frame["id"])["scopes"][0]
        values = self.ask("variables", variablesReference=scope["variablesReference"])["variables"]
        return {value["name"]: value["value"] for value in values}

    def go_on(self):
        self.ask("continue", threadId=self.stopped["threadId"])
        self.ask("disconnect", terminateDebuggee=False)
        self.socket.close()


LISTENING = r"debugger is listening on ([\d.]+):(\d+)"


def waiting_workers(dashboard, token):
    """Waiting workers by port, as the dashboard lists them to an editor."""
    query = "detail=true&filter_keys=num_paused_threads&filter_predicates=!%3D&filter_values=0"
    request = urllib.request.Request(f"http://{dashboard}/api/v0/workers?{query}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return {worker["debugger_port"]: worker for worker in json.load(answer)["data"]["result"]["result"]}


def held(handle):
    return Report(1.0, [observe(handle, with_stacks=True)]).held


def test_every_worker_at_a_breakpoint_says_where_shows_its_variables_and_goes_on(job):
    running = job("multiply", workers=2)
    dashboard = running.line(r"^dashboard (\S+)")[1]
    shown = ProcessHandle("worker", "here", *map(int, running.line(r"^shown (\d+) (\d+) (\d+)").groups()))
    handles = sorted({running.line(LISTENING).groups() for _ in range(2)})
    assert len(handles) == 2, "each of the two says its own"

    with pytest.raises(urllib.error.HTTPError, match="403"):
        waiting_workers(dashboard, "somebody else's token")
    listed = waiting_workers(dashboard, running.token)
    assert sorted((worker["ip"], str(port)) for port, worker in listed.items()) == handles

    assert held(shown), "a worker that waits is not taken for one that hangs"
    seen = set()
    handles.sort(key=lambda handle: listed[int(handle[1])]["pid"] != shown.pid)  # the displayed worker first
    for host, port in handles:
        client = Client(host, int(port))
        assert client.stopped["reason"] == "breakpoint"
        assert held(shown) or seen, "nor one that is looked at"
        variables = client.variables("multiply")
        seen.add((variables["factor"], variables["product"]))
        client.go_on()
    assert seen == {("6", "42"), ("7", "49")}
    assert running.line(r"answers (.*)")[1] == "[43, 50]"
    assert running.end() == 0


def test_a_worker_that_fails_waits_with_its_variables_and_then_the_error_arrives(job):
    running = job("fail", workers=1, RAY_DEBUG_POST_MORTEM="1")
    host, port = running.line(LISTENING).groups()
    client = Client(host, int(port))
    assert (client.stopped["reason"], client.stopped["description"]) == ("exception", "18 is too much")
    assert client.variables("fail")["product"] == "18"
    client.go_on()
    assert running.line(r"error (.*)")[1] == "ValueError('18 is too much')"
    assert running.end() == 0


def looked_at(response, answer, fields):
    breakpoint()
    return 1.0


@pytest.fixture
def debug(tmp_path, tiny_llama, monkeypatch, capsys):
    """Run a multi-worker job with --debug, typing this at the pdb prompt; returns status, stdout and stderr."""
    settings = {
        "model": {"path": str(tiny_llama), "precision": "fp32"},
        "data": {"train": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "rollout": {"engine": "torch", "max_new_tokens": 2, "tensor_parallel": 2}, "sharding": {"replicas": 2},
        "placement": {"kind": "ray", "devices": 2}, "reward": [{"name": f"{__name__}.looked_at"}],
        "algorithm": {"group_size": 2}, "logging": {"tensorboard": False}, "backend": {"options": {"threads": 1}},
        "train": {"steps": 1, "prompts_per_step": 1, "max_tokens_per_microbatch": 256},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setattr(sys, "breakpointhook", lambda: Pdb().set_trace(sys._getframe(1)))  # pdb.set_trace is pytest's here

    def run(typed):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        status = main(["grpo", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--debug"])
        return status, *capsys.readouterr()

    return run


def test_debug_runs_a_job_of_many_workers_in_one_process_where_a_breakpoint_is_pdb(debug):
    status, out, said = debug("p 'the answer is', answer\ncontinue\n" * 2)
    assert status == 0, said
    assert out.count("(Pdb) ('the answer is', ") == 2 and "step 1/1" in out


def test_leaving_pdb_leaves_the_run_even_from_a_reward(debug):
    status, _, said = debug("quit\n")
    assert status == 130 and said.endswith("rlcore: interrupted\n")


def test_what_was_chosen_for_the_controller_travels_to_the_workers():
    given = {"RAY_DEBUG": "legacy", "RAY_DEBUG_POST_MORTEM": "1", "HOME": "/home/somebody"}
    sent = debugging.environment(given)
    assert {name: sent[name] for name in given if name in sent} == {"RAY_DEBUG": "legacy", "RAY_DEBUG_POST_MORTEM": "1"}
    assert not {"RAY_DEBUG", "RAY_DEBUG_POST_MORTEM"} & set(debugging.environment({})), "ray's own defaults stand"


def test_a_debugger_that_is_asked_for_and_missing_is_an_error(monkeypatch):
    debugging.check({"RAY_DEBUG_POST_MORTEM": "1"})
    monkeypatch.setitem(sys.modules, "debugpy", None)  # as if not installed
    debugging.check({"RAY_DEBUG": "0"})
    with pytest.raises(PluginError, match=r"^RAY_DEBUG_POST_MORTEM=1: debugpy is not installed; on every node pip install"):
        debugging.check({"RAY_DEBUG_POST_MORTEM": "1"})
