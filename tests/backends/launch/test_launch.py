"""Launching: nodes rendezvous or report what is missing, and leave nothing behind but the trainer's exit status."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import psutil
import pytest
import yaml
from rlcore_backends.common import node_address
from rlcore_backends.launch import cluster, lifecycle
from rlcore_backends.launch.cluster import Head, RayNode
from rlcore_backends.launch.launcher import LaunchOptions, RayLauncher
from rlcore_backends.launch.lifecycle import NodeSetup
from run_files import write

from rlcore.cli.main import main
from rlcore.errors import ConfigError, RunError

ROOT = Path(__file__).parents[3]
TOKEN = "5a" * 32
ADDRESSES = [
    entry.address for entries in psutil.net_if_addrs().values() for entry in entries
    if entry.family == socket.AF_INET and not entry.address.startswith("127.")
]  # fmt: skip


@pytest.fixture
def run_file(tmp_path, tiny_llama) -> Path:
    return write(tmp_path, tiny_llama)


@pytest.fixture
def refused(run_file, capsys, monkeypatch):
    """The error of `rlcore launch` for invalid settings."""
    for name in [field.alias for field in LaunchOptions.model_fields.values()] + ["RAY_ADDRESS", "RAY_AUTH_MODE"]:
        monkeypatch.delenv(name, raising=False)

    def launch(*arguments: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["launch", str(run_file), *arguments]) == 2
        return capsys.readouterr().err.removeprefix("rlcore: ").rstrip("\n")

    return launch


# settings


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.0.1.1", "::1", "0.0.0.0"])
def test_an_address_that_means_each_node_itself_is_refused_for_several_nodes(refused, name):
    said = refused("--nnodes", "2", "--devices-per-node", "1", "--master-addr", name)
    assert re.match(rf"MASTER_ADDR: {re.escape(name)} is .*no address that other nodes reach.*on each of them .* itself", said)


def test_the_shell_launcher_takes_its_settings_from_the_environment(run_file):
    settings = {"NNODES": "2", "NPUS_PER_NODE": "1", "MASTER_ADDR": "localhost", "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "examples" / "launch.sh"), str(run_file)]
    ended = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("rlcore: MASTER_ADDR: localhost is ")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DEVICES_PER_NODE": "1", "GPUS_PER_NODE": "2"}, "DEVICES_PER_NODE=1 and GPUS_PER_NODE=2 differ; set one of them"),
        ({"NNODES": "2"}, "DEVICES_PER_NODE: must be set"),
        ({"DEVICES_PER_NODE": "1", "NNODES": "2"}, "MASTER_ADDR: 2 nodes must know the head"),
        ({"DEVICES_PER_NODE": "1", "NNODES": "two"}, "NNODES: input should be a valid integer.*it is 'two'"),
        ({"DEVICES_PER_NODE": "1", "MASTER_ADDR": "no.such.invalid"}, "MASTER_ADDR: 'no.such.invalid' has no address"),
        ({"DEVICES_PER_NODE": "1", "CURRENT_IP": "203.0.113.9"}, "CURRENT_IP: 203.0.113.9 is not an address of this node"),
        ({"DEVICES_PER_NODE": "1", "RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE: disabled lets everyone .*; unset it"),
        ({"DEVICES_PER_NODE": "1", "WORKER_PORTS": "10"}, "WORKER_PORTS: string should match pattern"),
        ({"DEVICES_PER_NODE": "1", "JEMALLOC": "/no/libjemalloc.so.2"}, "JEMALLOC: /no/libjemalloc.so.2 cannot be preloaded: "),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(refused, environment, message):
    said = refused(**environment)
    assert re.match(message, said), said


def test_a_run_that_wants_more_devices_than_there_are_is_refused(refused):
    said = refused("placement.devices=3", DEVICES_PER_NODE="2")
    assert said == "placement: 3 devices, but all nodes have 2; lower it, or add nodes"


def test_a_port_that_is_taken_is_named(refused, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(DEVICES_PER_NODE="1", RAY_PORT=str(port), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert said.startswith(f"RAY_PORT: port {port} of this node is not free")
    assert not (tmp_path / "token").exists()


def test_what_is_given_comes_before_the_environment():
    environment = {"NNODES": "3", "NPUS_PER_NODE": "8"}
    assert RayLauncher({}, environment).devices == 24
    assert RayLauncher({"NNODES": "2", "DEVICES_PER_NODE": "4"}, environment).devices == 8


def test_the_documentation_lists_every_variable_with_its_default():
    documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs" / "launching.md").read_text(), re.MULTILINE))
    for field in LaunchOptions.model_fields.values():
        default = "required" if field.is_required() else "" if field.default in (None, "") else f"`{field.default}`"
        assert documented[field.alias] == ("" if field.default is False else default), field.alias


# addresses and the token


@pytest.mark.parametrize("address", ["127.0.0.1", *ADDRESSES])
def test_the_address_found_is_the_one_that_the_other_side_sees(address):
    with socket.create_server((address, 0)) as server, socket.create_connection(server.getsockname()) as _:
        seen = server.accept()[1][0]
    assert node_address.towards(address, "MASTER_ADDR") == seen


def test_a_token_is_made_once_for_its_owner_alone(tmp_path):
    file = tmp_path / "ray" / "token"
    cluster.create_token(file)
    first = file.read_text()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert file.stat().st_mode & 0o777 == 0o600
    cluster.create_token(file)
    assert file.read_text() == first


def test_what_a_program_has_started_ends_with_it(tmp_path):
    """Also children that ignore SIGTERM. Another program's processes stay."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {stubborn!r}]); time.sleep(600)"
    programs = []
    for name in ("one", "other"):
        with (tmp_path / name).open("wb") as log:
            programs.append(cluster.start([sys.executable, "-c", parent], dict(os.environ), log))
        while not (tmp_path / name).read_text():
            time.sleep(0.05)
    families = [[psutil.Process(each.pid), *psutil.Process(each.pid).children(recursive=True)] for each in programs]
    assert [len(family) for family in families] == [2, 2]
    try:
        cluster.stop(programs[0])
        assert _alive(families[0], seconds=5) == [] and len(_alive(families[1], seconds=0)) == 2
    finally:
        cluster.stop(programs[1])
    assert _alive(families[1], seconds=5) == []


# a cluster of two nodes that share this machine's address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Folder for Ray's files: a short path, because of its sockets."""
    with tempfile.TemporaryDirectory(prefix="rlcore-test-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def setup(folder) -> Iterator[NodeSetup]:
    """Node setup of a run whose head and one more node are up."""
    port, address = _free_port(), ADDRESSES[0] if ADDRESSES else "127.0.0.1"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment["RAY_START_HOOK"] = "rlcore_backends.launch.cluster.without_client_server"
    arguments = ["--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
    setup = NodeSetup(2, {"CPU": 1.0}, address, f"{address}:{port}", 1.0, environment, arguments, folder)
    head = Head(setup.head, TOKEN)
    with contextlib.ExitStack() as nodes:
        for extra in (["--head", f"--port={port}", "--include-dashboard=false"], [f"--address={setup.head}"]):
            node = nodes.enter_context(RayNode(address, [*extra, *arguments], environment, folder))
            lifecycle.started(node, head)
        yield setup


@pytest.fixture
def head(setup) -> Iterator[Head]:
    head = Head(setup.head, TOKEN)
    for note in (lifecycle.MEMBERS, lifecycle.END):
        head.write(note, None)
    assert len(head.nodes()) == 2
    yield head
    assert len(head.nodes()) == 2, "the cluster is as it was"


@pytest.fixture
def own(head, setup):
    """The head's own node, as far as the rendezvous uses it."""

    class Own:
        name = head.nodes()[0].name

        def check(self) -> None:
            """It runs."""

    return Own()


def test_nodes_that_are_missing_are_told_with_those_that_came(setup, head, own):
    began = time.monotonic()
    with pytest.raises(RunError) as told:
        lifecycle.gather(replace(setup, nodes=5), own, head)
    assert time.monotonic() - began < 10
    assert str(told.value).startswith(f"3 of 5 nodes did not come within 1 s; there: {setup.address}, {setup.address}. Start")


def test_a_node_too_many_is_an_error_and_no_wait(setup, head, own):
    with pytest.raises(ConfigError, match=r"NNODES: 1, but 2 nodes came: .*stop the extra ones, or set NNODES=2"):
        lifecycle.gather(replace(setup, nodes=1, wait_seconds=1e6), own, head)


def test_a_node_with_another_number_of_devices_is_named(setup, head, own):
    wants = replace(setup, resources={"CPU": 4.0}, wait_seconds=1e6)
    with pytest.raises(ConfigError, match=f"DEVICES_PER_NODE: {setup.address} gives 1 CPU and {setup.address} 4; set the same"):
        lifecycle.gather(wants, own, head)


def test_the_nodes_of_a_run_are_told_who_belongs_to_it(setup, head, own):
    nodes = lifecycle.gather(setup, own, head)
    assert head.read(lifecycle.MEMBERS) == [node.name for node in nodes]


def test_a_node_that_comes_when_all_are_there_is_sent_away(setup, head, own):
    lifecycle.gather(setup, own, head)
    with pytest.raises(ConfigError, match=f"the run at {setup.head} has its 2 nodes, and {setup.address} is one too many"):
        lifecycle.follow(replace(setup, wait_seconds=60))


def test_a_node_ends_as_the_run_did(setup, head, capsys):
    statuses: list[int] = []
    follower = threading.Thread(target=lambda: statuses.append(lifecycle.follow(replace(setup, wait_seconds=60))))
    follower.start()
    limit = time.monotonic() + 120
    while len(head.nodes()) < 3 and time.monotonic() < limit:
        time.sleep(0.2)
    head.write(lifecycle.END, {"status": 7, "reason": "the trainer ended with status 7"})
    follower.join(60)
    assert statuses == [7]
    assert "the run is over: the trainer ended with status 7" in capsys.readouterr().out


def test_a_head_that_ends_an_earlier_run_is_not_joined(setup, head):
    head.write(lifecycle.END, {"status": 0, "reason": "done"})
    with pytest.raises(RunError, match=f"waited 1 s for the head: the run at {setup.head} is ending"):
        lifecycle.follow(setup)


def test_a_head_that_is_not_there_is_waited_for_and_named(setup):
    nobody = f"{setup.address}:{_free_port()}"
    with pytest.raises(RunError, match=f"waited 1 s for the head: no Ray head answers at {nobody}.*MASTER_ADDR and RAY_PORT"):
        lifecycle.follow(replace(setup, head=nobody))


def test_a_token_that_is_missing_or_wrong_is_told(setup, head, tmp_path):
    without = {name: value for name, value in setup.environment.items() if name != "RAY_AUTH_TOKEN"}
    with pytest.raises(RunError, match=f"there is no token at {tmp_path}/token; bring the head's there"):
        lifecycle.follow(replace(setup, environment={**without, "RAY_AUTH_TOKEN_PATH": f"{tmp_path}/token"}))
    with pytest.raises(ConfigError, match=f"the Ray head at {setup.head} refuses this node's token; bring the head's here"):
        lifecycle.follow(replace(setup, environment={**without, "RAY_AUTH_TOKEN": "6b" * 32}))


# whole launches

PROGRAM = """
import os, sys
from rlcore import registry
from rlcore.errors import RlcoreError
backend = registry.load("backends", "cpu")
try:
    sys.exit(registry.load("launchers", "ray")({}, os.environ).run(sys.argv[1:], backend(backend.Options(threads=1))))
except RlcoreError as error:
    sys.exit(f"rlcore: {error}")
"""


class Launch:
    """A launcher process whose trainer is a given program; its output is read line by line."""

    def __init__(self, trainer: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", PROGRAM, sys.executable, "-uc", f"import os, signal, sys, time\n{trainer}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
        self.said = ""

    def until(self, text: str) -> None:
        for line in self.process.stdout:
            self.said += line
            if text in line:
                return
        pytest.fail(f"the launcher ended without saying {text!r}: {self.said}")

    def ended(self) -> int:
        self.said += self.process.communicate(timeout=120)[0]
        return self.process.returncode


def _alive(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Processes still running then; zombies, which wait for init to reap them, do not count."""
    limit = time.monotonic() + seconds
    while True:
        alive = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                alive += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        if not alive or time.monotonic() > limit:
            return alive
        time.sleep(0.2)


@pytest.fixture
def alone(tmp_path, folder) -> dict[str, str]:
    """Settings of a single-node launch with its own Ray."""
    ports = {"RAY_PORT": str(_free_port()), "DASHBOARD_PORT": "0"}
    places = {"RAY_AUTH_TOKEN_PATH": f"{tmp_path}/token", "RAY_TEMP_DIR": f"{folder}/alone"}
    return {"DEVICES_PER_NODE": "1", **places, **ports}


def test_a_launch_ends_as_its_trainer_does_stops_its_own_ray_alone_and_shows_the_token_to_nobody(head, alone, tmp_path, folder):
    launch = Launch("print('training', os.environ['RAY_ADDRESS'])\ntime.sleep(2)\nsys.exit(7)", alone)
    launch.until("training")
    token = (tmp_path / "token").read_text()
    own = psutil.Process(launch.process.pid).children(recursive=True)
    assert any("gcs_server" in process.name() for process in own)
    assert not [line for process in psutil.process_iter(["cmdline"]) if token in (line := str(process.info["cmdline"]))]
    assert launch.ended() == 7
    assert token not in launch.said
    assert f"training 127.0.0.1:{alone['RAY_PORT']}" in launch.said
    assert _alive(own, seconds=0) == []
    logs = [file for file in (folder / "alone").rglob("*") if file.is_file()]
    assert logs and not [file for file in logs if token.encode() in file.read_bytes()]


def test_a_launcher_that_is_killed_takes_all_it_started_with_it(alone):
    launch = Launch("print('training')\ntime.sleep(600)", alone)
    launch.until("training")
    own = psutil.Process(launch.process.pid).children(recursive=True)
    assert len(own) > 3
    launch.process.kill()
    assert _alive(own, seconds=30) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_trainer_once_and_its_leave_is_waited_for(setup, number):
    trainer = (
        "def leave(*_):\n    print('saving')\n    time.sleep(1)\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\nprint('training')\ntime.sleep(600)"
    )
    launch = Launch(trainer, {"RAY_ADDRESS": setup.head, "RAY_AUTH_TOKEN": TOKEN})
    launch.until("training")
    launch.process.send_signal(number)
    assert launch.ended() == 130
    assert launch.said.count("saving") == 1


def test_a_trainer_that_is_killed_has_the_status_a_shell_gives_it(setup):
    launch = Launch("os.kill(os.getpid(), signal.SIGKILL)", {"RAY_ADDRESS": setup.head, "RAY_AUTH_TOKEN": TOKEN})
    assert launch.ended() == 128 + signal.SIGKILL


def test_a_run_in_a_cluster_that_exists_saves_when_told_to_leave_and_leaves_it_as_it_was(setup, head, run_file, tmp_path):
    settings = [str(run_file), "train.steps=100000", "placement.devices=2", "--run-dir", str(tmp_path / "run")]
    environment = {**os.environ, "RAY_ADDRESS": setup.head, "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-m", "rlcore", "launch", *settings]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launch:
        limit = threading.Timer(240, launch.kill)
        limit.start()
        before = list(takewhile(lambda line: not line.startswith("step 1/"), launch.stdout))
        launch.terminate()
        after = launch.communicate()[0]
        limit.cancel()
    assert launch.returncode == 130, "".join([*before, after])
    assert any(f"trains in the cluster at {setup.head}" in line for line in before)
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == f"step_{steps:06}"
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["placement"]
    assert (recorded["kind"], recorded["devices"]) == ("ray", 2)


def test_two_nodes_on_one_machine_train_together():
    command = ["bash", str(ROOT / "ci" / "two_nodes.sh"), "together"]
    ended = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False)
    if ended.returncode == 77:
        pytest.skip(ended.stderr.strip())
    assert ended.returncode == 0, ended.stderr
