"""A hub in this process: answers huggingface_hub's client as huggingface.co does, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(sets: Mapping[str, Path], gated: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve data sets by id; yields the endpoint and the list of requests so far. `gated`: an id that asks for conditions."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            for name, folder in sets.items():
                if path == f"/api/datasets/{name}/revision/main":
                    return self._gated() if name == gated else self._json({"id": name, "sha": COMMIT, "siblings": []})
                if path == f"/api/datasets/{name}/tree/{COMMIT}":
                    return self._json([_entry(file, folder) for file in sorted(folder.rglob("*")) if file.is_file()])
                if path.startswith(start := f"/datasets/{name}/resolve/{COMMIT}/"):
                    return self._file(folder, path.removeprefix(start))
                if path.startswith(start := f"/storage/{name}/"):
                    return self._send(200, (folder / path.removeprefix(start)).read_bytes(), {})
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        def _file(self, folder: Path, name: str) -> None:
            """Large files are a redirect to a store, as on the hub; its answer to HEAD has their size and hash."""
            content = (folder / name).read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            common = {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}
            if name.endswith(".parquet"):
                place = f"/storage/{next(key for key, value in sets.items() if value == folder)}/{name}"
                linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content)), "Location": f"{store}{place}"}
                return self._send(302, b"", common | linked)
            self._send(200, content, common)

        def _gated(self) -> None:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    store = f"http://localhost:{server.server_port}"  # another host, as the hub's store is
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _entry(file: Path, folder: Path) -> dict[str, object]:
    content = file.read_bytes()
    return {
        "type": "file", "path": str(file.relative_to(folder)), "size": len(content), "oid": hashlib.sha1(content).hexdigest(),
    }  # fmt: skip
