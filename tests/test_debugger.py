"""Ray's distributed debugger, as an editor uses it: a client of the Debug Adapter Protocol attaches to workers that wait."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from itertools import count

import psutil
import pytest
from rlcore_backends import ray_debugging

pytest.importorskip("ray", reason="needs requirements/ray.txt")
pytest.importorskip("debugpy", reason="needs requirements/ray.txt")

PATIENCE = 45  # seconds for anything one waits for
JOB = '''
import os, sys
from rlcore_backends import ray_debugging
os.environ.update(ray_debugging.CONTROLLER)
import ray

class Worker:
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
try:
    print("answers", ray.get([getattr(worker, method).remote(6 + rank) for rank, worker in enumerate(pool)]), flush=True)
except ValueError as error:
    print("error", repr(error.cause), flush=True)
'''


class Job:
    """The program above in a process of its own, and what it has said."""

    def __init__(self, folder, method, workers, variables):
        (folder / "job.py").write_text(JOB, encoding="utf-8")
        self.cluster = tempfile.mkdtemp(prefix="rlcore-")  # short: sockets lie in it
        self.token = secrets.token_hex(16)
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "job.py"), method, str(workers), self.cluster], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=os.environ | {"RAY_AUTH_TOKEN": self.token} | variables,
        )  # fmt: skip
        self.said = []
        self.limit = threading.Timer(2 * PATIENCE, self.kill)  # a job that waits for ever ends the lines it is asked for
        self.limit.start()

    def line(self, pattern):
        """The match in the first line that has one from here on."""
        for line in self.process.stdout:
            self.said.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the job ended without {pattern!r}:\n{''.join(self.said)}")

    def end(self):
        """Its exit status, when every process of its cluster is gone."""
        status = self.process.wait(PATIENCE)
        limit = time.monotonic() + PATIENCE
        while left := processes_with(self.token):
            assert time.monotonic() < limit, left
            time.sleep(0.1)
        return status

    def stop(self):
        self.limit.cancel()
        self.kill()
        shutil.rmtree(self.cluster, ignore_errors=True)

    def kill(self):
        for process in processes_with(self.token):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def processes_with(token):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN") == token:
                found.append(process)
    return found


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(method, workers, **variables):
        jobs.append(Job(tmp_path, method, workers, variables))
        return jobs[-1]

    yield start
    for one in jobs:
        one.stop()


class Client:
    """As much of the Debug Adapter Protocol as it takes to attach, look and go on."""

    def __init__(self, host, port):
        self.socket = socket.create_connection((host, port), timeout=PATIENCE)
        self.stream = self.socket.makefile("rb")
        self.numbers = count(1)
        self.waiting = []  # messages that came while another was wanted
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
        """Names and values in the innermost frame of `function`."""
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
    """What the dashboard tells an editor of workers that wait, by their port."""
    query = "detail=true&filter_keys=num_paused_threads&filter_predicates=!%3D&filter_values=0"
    request = urllib.request.Request(f"http://{dashboard}/api/v0/workers?{query}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return {worker["debugger_port"]: worker for worker in json.load(answer)["data"]["result"]["result"]}


def test_every_worker_at_a_breakpoint_says_where_shows_its_variables_and_goes_on(job):
    running = job("multiply", workers=2)
    dashboard = running.line(r"^dashboard (\S+)")[1]
    places = sorted({running.line(LISTENING).groups() for _ in range(2)})
    assert len(places) == 2, "each of the two says its own"

    with pytest.raises(urllib.error.HTTPError, match="403"):
        waiting_workers(dashboard, "somebody else's token")
    listed = waiting_workers(dashboard, running.token)
    assert sorted((worker["ip"], str(port)) for port, worker in listed.items()) == places

    seen = set()
    for host, port in places:
        client = Client(host, int(port))
        assert client.stopped["reason"] == "breakpoint"
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


def test_what_was_chosen_for_the_controller_travels_to_the_workers():
    given = {"RAY_DEBUG": "legacy", "RAY_DEBUG_POST_MORTEM": "1", "HOME": "/home/somebody"}
    sent = ray_debugging.environment(given)
    assert {name: sent[name] for name in given if name in sent} == {"RAY_DEBUG": "legacy", "RAY_DEBUG_POST_MORTEM": "1"}
    assert not {"RAY_DEBUG", "RAY_DEBUG_POST_MORTEM"} & set(ray_debugging.environment({})), "ray's own defaults stand"


def test_a_debugger_that_is_asked_for_and_missing_is_said(monkeypatch):
    assert ray_debugging.caution({"RAY_DEBUG_POST_MORTEM": "1"}) is None
    monkeypatch.setitem(sys.modules, "debugpy", None)  # as where it is not installed
    assert ray_debugging.caution({}) is None and ray_debugging.caution({"RAY_DEBUG": "0"}) is None
    said = ray_debugging.caution({"RAY_DEBUG_POST_MORTEM": "1"})
    assert said.startswith("RAY_DEBUG_POST_MORTEM=1 asks for the debugger") and said.endswith("requirements/ray.txt everywhere")
