"""Servers that are started here: nothing of them is left, whatever ends; and errors say how one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rlcore_backends.server.process import ServerProcess
from rlcore_backends.server.start import ServerOptions, fleet

from rlcore.config.loader import validate
from rlcore.errors import ConfigError

FAMILY = (  # a server that has a child, as engines have; both write their process ids
    "import os, signal, subprocess, sys, time\n"
    "if len(sys.argv) > 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
    "time.sleep(600)\n"
)
HTTP = (
    "import http.server, sys\n"
    "class Handler(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self): self.send_response(200); self.end_headers()\n"
    "    def log_message(self, *_): pass\n"
    "http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()\n"
)


def pids(file: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while not (file.exists() and len(words := file.read_text().split()) == 2):
        assert time.monotonic() < deadline, "it does not start"
        time.sleep(0.02)
    return [int(word) for word in words]


def gone(numbers: list[int], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in numbers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def start(file: Path, *more: str) -> ServerProcess:
    return ServerProcess([sys.executable, "-c", FAMILY, str(file), *more], os.environ)


def test_a_stopped_server_is_gone_with_its_children(tmp_path):
    process = start(tmp_path / "pids")
    family = pids(tmp_path / "pids")
    process.stop()
    assert gone(family, 1.0) and process.ended() == "exit status 143 (SIGTERM)"


def test_a_server_that_ignores_the_signal_is_killed(tmp_path):
    process = start(tmp_path / "pids", "stubborn")
    family = pids(tmp_path / "pids")
    process.stop()
    assert gone(family, 1.0) and process.ended() == "exit status 137 (SIGKILL)"


def test_the_children_of_a_server_that_dies_go_with_it(tmp_path):
    process = start(tmp_path / "pids")
    server, child = pids(tmp_path / "pids")
    os.kill(server, signal.SIGKILL)
    assert process.ended(10) == "exit status 137 (SIGKILL)" and gone([child])


ENDS = {
    "it is done": "",
    "an error": "raise RuntimeError",
    "Ctrl-C": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
    "kill -9": "os.kill(os.getpid(), signal.SIGKILL)",
    "an exit without a clean-up": "os._exit(1)",
    "it drops the server": "del process; time.sleep(60)",
}


@pytest.mark.parametrize("last", ENDS.values(), ids=ENDS)
def test_a_server_ends_with_the_process_that_started_it(last, tmp_path):
    file = tmp_path / "pids"
    program = (
        "import os, signal, sys, time\nfrom rlcore_backends.server.process import ServerProcess\n"
        f"process = ServerProcess([sys.executable, '-c', {FAMILY!r}, {str(file)!r}], os.environ)\n"
        f"while not os.path.exists({str(file)!r}): time.sleep(0.02)\n"
        f"{last}\n"
    )
    controller = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    try:
        assert gone(pids(file))
    finally:
        controller.kill()
        controller.wait()


def options(**settings) -> ServerOptions:
    return validate(ServerOptions, settings, "rollout.options.")


def test_servers_are_started_each_with_its_environment(tmp_path):
    variables = [{"PART": "first"}, {"PART": "second"}]
    chosen = options(servers=2, environment=variables, log_folder=str(tmp_path / "logs"))
    program = "import os; print(os.environ['PART'], os.environ['ALL'], flush=True)\n" + HTTP
    made = fleet(chosen, lambda host, port: [sys.executable, "-c", program, host, str(port)], {"ALL": "yes"}, lambda: None)
    assert len({server.address for server in made.servers}) == 2
    logs = sorted(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert logs == ["first yes\n", "second yes\n"]
    guards = [server.process.pid for server in made.servers]
    del made
    assert gone(guards)


def test_a_server_that_does_not_start_is_named_with_its_status_and_last_words():
    program = "import sys; print('no such model'); sys.exit(3)"
    with pytest.raises(ConfigError, match=r"server http://127\.0\.0\.1:\d+ (.|\n)*exit status 3; (.|\n)*no such model"):
        fleet(options(), lambda host, port: [sys.executable, "-c", program], {}, lambda: None)


def test_a_server_has_a_limited_time_to_start():
    program = "import time; print('loading', flush=True); time.sleep(600)"
    with pytest.raises(ConfigError, match=r"it was still running; (.|\n)*loading"):
        fleet(options(start_seconds=1.0), lambda host, port: [sys.executable, "-c", program], {}, lambda: None)


def test_an_address_at_which_nothing_answers_is_refused_at_once():
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"rollout\.engine: the server http://127\.0\.0\.1:9 broke off GET /health"):
        fleet(options(addresses=["http://127.0.0.1:9"]), lambda host, port: [], {}, lambda: None)
    assert time.monotonic() - began < 5


REFUSED = {
    "addresses: 'localhost:80' is no address; write http://localhost:80": {"addresses": ["localhost:80"]},
    "servers: is for servers that are started": {"addresses": ["http://a:1"], "servers": 2},
    "environment: has 1 entries for 2 servers": {"servers": 2, "environment": [{}]},
    "rollout.options.server: no such setting; did you mean 'servers'": {"server": 2},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_options_are_named(message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        options(**REFUSED[message])
