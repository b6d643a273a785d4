"""A model hub on the loopback interface: the few answers of the real one that its client asks for."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee00" * 5
OTHER_COMMIT = "deadbeef" * 5


@dataclass(frozen=True)
class Refusal:
    """An answer instead of the file or listing: a status, and the code by which the hub says why."""

    status: int
    error_code: str = ""


@dataclass
class FakeHub:
    """Repositories by `models/ORG/NAME` or `datasets/ORG/NAME`, each a folder whose files are served."""

    repositories: dict[str, Path] = field(default_factory=dict)
    token: str | None = None
    """If set, what the Authorization header must hold."""
    commit: str = COMMIT
    refuse: Callable[[str, str], Refusal | None] = lambda _method, _path: None
    """Called with each request's method and path."""
    truncate: Callable[[str], int | None] = lambda _path: None
    """How many bytes of a file to send before the connection ends."""
    corrupt: Callable[[str], bool] = lambda _path: False
    """Whether to send other bytes than the listing says."""
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def fetched(self) -> list[str]:
        """Names of the files that were asked for."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer on a free port until the block ends."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are kept in the hub."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        refusal = self.hub.refuse(self.command, path)
        if refusal is None and self.hub.token not in (None, self._token()):
            refusal = Refusal(401)
        if refusal is not None:
            headers = {"X-Error-Code": refusal.error_code} if refusal.error_code else {}
            self._send(refusal.status, json.dumps({"error": "refused"}).encode(), headers)
        elif match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._listing(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(f"{match[1] or 'models/'}{match[2]}", match[4])
        else:
            self._send(404, b"{}", {})

    def _token(self) -> str:
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    def _listing(self, key: str, revision: str) -> None:
        folder = self.hub.repositories.get(key)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            body = {"id": key.partition("/")[2], "sha": self.hub.commit, "siblings": files}
            self._send(200, json.dumps(body).encode(), {})

    def _file(self, key: str, name: str) -> None:
        path = self.hub.repositories[key] / name
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        headers = {"X-Repo-Commit": self.hub.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if self.hub.corrupt(name):
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            self.hub.ranges.append(f"{name} {wanted[0]}")
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[int(wanted[1]) :]
        self._send(status, content, headers, self.hub.truncate(name) if self.command == "GET" else None)

    def _send(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
            if sent is not None:
                self.close_connection = True


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    entry: dict[str, Any] = {"rfilename": str(path.relative_to(folder)), "size": len(content)}
    if path.suffix in (".safetensors", ".parquet"):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
