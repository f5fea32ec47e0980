"""The launcher's interface to Ray: the cluster's token, queries to the head, and this node's Ray processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from rlcore.errors import ConfigError, RunError

ANSWER_SECONDS = 5.0  # a running head answers in milliseconds
STOP_SECONDS = 20.0


class Unreachable(RunError):
    """Nothing answers at the head's address."""


# the token


def token_file(environment: Mapping[str, str]) -> Path | None:
    """File that Ray reads the token from; None when the environment holds the token itself."""
    if environment.get("RAY_AUTH_TOKEN"):
        return None
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def there(file: Path | None) -> bool:
    """Whether there is a token to read: another node may be about to write it."""
    return file is None or (file.is_file() and file.stat().st_size > 0)


def create_token(file: Path | None) -> None:
    """Write a new token, readable by its owner only, unless there is one."""
    if file is None or there(file):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: no token can be written to {file}: {error.strerror}") from None
    with open(descriptor, "w", encoding="utf-8") as opened:
        opened.write(secrets.token_hex(32))


def read_token(environment: Mapping[str, str]) -> str:
    file = token_file(environment)
    return environment["RAY_AUTH_TOKEN"] if file is None else file.read_text(encoding="utf-8").strip()


# queries to the head


@dataclass(frozen=True)
class Node:
    """A living node of the cluster."""

    name: str  # unique: two nodes can share an address
    address: str
    resources: Mapping[str, float]


class Head:
    """Client of Ray's head by plain gRPC: Ray's own client kills its process when the head is silent for a minute."""

    def __init__(self, address: str, token: str) -> None:
        import grpc
        from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

        options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", 1000)]
        channel = grpc.insecure_channel(address, options)
        self.address = address
        self._credentials = [("authorization", f"Bearer {token}")]
        self._messages: Any = gcs_service_pb2
        self._nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        self._notes = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)

    def nodes(self) -> list[Node]:
        """Living nodes, sorted by address."""
        reply = self._ask(self._nodes.GetAllNodeInfo, self._messages.GetAllNodeInfoRequest())
        alive = [info for info in reply.node_info_list if info.state == info.ALIVE]
        nodes = [Node(info.node_name, info.node_manager_address, dict(info.resources_total)) for info in alive]
        return sorted(nodes, key=lambda node: node.address)

    def write(self, name: str, value: Any) -> None:
        """Write a note for the other nodes' launchers."""
        request = {"key": name.encode(), "value": json.dumps(value).encode(), "overwrite": True, "namespace": b"rlcore"}
        self._ask(self._notes.InternalKVPut, self._messages.InternalKVPutRequest(**request))

    def read(self, name: str) -> Any:
        """Read a note; None until it is written."""
        request = self._messages.InternalKVGetRequest(key=name.encode(), namespace=b"rlcore")
        reply = self._ask(self._notes.InternalKVGet, request)
        return json.loads(reply.value) if reply.value else None

    def _ask(self, call: Any, request: Any) -> Any:
        import grpc

        try:
            return call(request, timeout=ANSWER_SECONDS, metadata=self._credentials)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(
                    f"the Ray head at {self.address} refuses this node's token; bring the head's here: RAY_AUTH_TOKEN_PATH "
                    "names its file"
                ) from None
            raise Unreachable(f"no Ray head answers at {self.address}: {error.details()}") from None


# this node's processes

_TIED = (  # wrapper that ends its program when the parent is killed; set in the child, so that no preexec_fn runs after fork
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the launcher is gone'); os.execv(sys.argv[2], sys.argv[2:])"
)


def start(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a program in a new session, so that the terminal's Ctrl-C reaches it through us only. Without `log`: our output."""
    tied = [sys.executable, "-c", _TIED, str(os.getpid()), *command]
    return subprocess.Popen(tied, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program and whatever else still runs in its session; no other process."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    for left in _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    found = []
    for number in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(number) == leader:
                found.append(number)
    return found


class RayNode:
    """Context of this node's Ray processes."""

    def __init__(self, address: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None) -> None:
        """arguments: for `ray start`. folder: Ray's sockets and logs; None is a new one in /tmp, as paths must be short."""
        self.name = f"{address}-{secrets.token_hex(4)}"
        self._arguments = [f"--node-ip-address={address}", f"--node-name={self.name}", *arguments]
        self._environment, self._given = environment, folder
        self.keep_logs = True

    def __enter__(self) -> RayNode:
        self.folder = self._given or Path(tempfile.mkdtemp(prefix="rlcore-ray-", dir="/tmp"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / f"{self.name}.log"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false", "--disable-usage-stats"]
        command = [*ray, f"--temp-dir={self.folder}", *self._arguments]
        with self._log.open("wb") as log:
            self._process = start(command, self._environment, log)
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._process)
        if not self.keep_logs and self._given is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        """RunError when Ray's processes have ended by themselves."""
        if self._process.poll() is not None:
            raise RunError(f"Ray has ended on this node (status {self._process.returncode}):\n{self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        stamp = re.compile(r"^\S+ \S+\s[A-Z]+ \S+ -- ")
        return "\n".join(f"  {stamp.sub('', line)}" for line in lines[-12:]) + f"\n  more in {self.folder}"


def without_client_server(parameters: Any, head: bool) -> None:
    """RAY_START_HOOK: no server for `ray://` clients. None is used here, and two Rays on one machine would share its port."""
    parameters.ray_client_server_port = None
