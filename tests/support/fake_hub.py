"""A model hub on the loopback interface: the few answers of the real one that its client needs.

Reading: listing and files. Writing: making a repository, Git LFS over its batch protocol, and a commit in one request.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.support.services.serving import serving

COMMIT = "c0ffee00" * 5
OTHER_COMMIT = "deadbeef" * 5


@dataclass(frozen=True)
class Rejection:
    """An answer instead of the file or listing: a status and the hub's error code."""

    status: int
    error_code: str = ""
    location: str = ""
    """Where to go instead, with a redirecting status."""


@dataclass
class FakeHub:
    """Serves repositories from folders `models/ORG/NAME` and `datasets/ORG/NAME`."""

    repositories: dict[str, Path] = field(default_factory=dict)
    token: str | None = None
    """If set, what the Authorization header must hold."""
    commit: str = COMMIT
    role: str = "write"
    """What the token is for, as the hub describes it."""
    reject: Callable[[str, str], Rejection | None] = lambda _method, _path: None
    """Called with each request's method and path."""
    corrupt: Callable[[str], bool] = lambda _path: False
    """Whether to send other bytes than the listing says."""
    folder: Path | None = None
    """Where repositories that are made here get their folders; none can be made without."""
    commits: dict[str, str] = field(default_factory=dict)
    """The newest commit of each repository that has been written to."""
    large: dict[str, bytes] = field(default_factory=dict)
    """Content of large files by SHA-256, uploaded and perhaps not committed."""
    pointers: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """SHA-256 and size of large files as a commit has stated them, which is what is listed, whatever is kept."""
    tokens: set[str] = field(default_factory=set)
    """Authorization headers that came in."""
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    @property
    def fetched(self) -> list[str]:
        """Names of the requested files."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


@contextmanager
def serve(hub: FakeHub, host: str = "127.0.0.1", *, tls: tuple[Path, Path] | None = None) -> Iterator[FakeHub]:
    """Answer on a free port of an address of this machine until the block ends.

    `tls`: the server's certificate and its key, in PEM.
    """
    with serving(_Handler, host, tls=tls, hub=hub) as address:
        hub.endpoint = f"{'https' if tls else 'http'}://{address}"
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self._token())
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        rejection = self.hub.reject(self.command, path)
        if rejection is None and self.hub.token not in (None, self._token()) and not path.startswith("/large/"):
            rejection = Rejection(401)
        if rejection is not None:
            headers = {"X-Error-Code": rejection.error_code} if rejection.error_code else {}
            headers |= {"Location": rejection.location} if rejection.location else {}
            self._send(rejection.status, json.dumps({"error": "rejected"}).encode(), headers)
        elif self.command in ("POST", "PUT"):
            self._write(path, content)
        elif path == "/api/whoami-v2":
            self._reply({"name": "somebody", "auth": {"type": "access_token", "accessToken": {"role": self.hub.role}}})
        elif match := re.fullmatch(r"/api/(models/[^/]+/[^/]+)/auth-check/write", path):
            self._auth_check(match[1])
        elif match := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._listing(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(f"{match[1] or 'models/'}{match[2]}", match[4])
        else:
            self._send(404, b"{}", {})

    do_HEAD = do_GET = do_PUT = do_POST = _answer  # noqa: N815 - names of http.server

    def _write(self, path: str, content: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(content))
        elif path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = ({"path": name, "uploadMode": _mode(name), "shouldIgnore": False} for name in names)
            self._reply({"files": list(modes)})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._reply(
                {"transfer": "basic", "objects": [self._action(file) for file in json.loads(content)["objects"]]}
            )
        elif match := re.fullmatch(r"/large/(\w+)", path):
            if hashlib.sha256(content).hexdigest() == match[1]:
                self.hub.large[match[1]] = content
            self._send(200 if match[1] in self.hub.large else 400, b"", {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(f"models/{match[1]}", [json.loads(line) for line in content.splitlines()])
        else:
            self._send(404, b"{}", {})

    def _auth_check(self, key: str) -> None:
        if key not in self.hub.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(200 if self.hub.role != "read" else 403, b"{}", {})

    def _create(self, wanted: dict[str, Any]) -> None:
        key = f"models/{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{key.partition('/')[2]}"
        if key in self.hub.repositories or self.hub.folder is None:
            self._send(409, json.dumps({"url": url}).encode(), {})
            return
        assert wanted["visibility"] == "private"
        self.hub.repositories[key] = self.hub.folder / key
        self.hub.repositories[key].mkdir(parents=True)
        (self.hub.repositories[key] / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self._reply({"url": url, "name": key.partition("/")[2]})

    def _action(self, file: dict[str, Any]) -> dict[str, Any]:
        # By the way that the client has taken.
        address = f"{self.hub.endpoint.partition('://')[0]}://{self.headers['Host']}"
        upload = {"upload": {"href": f"{address}/large/{file['oid']}"}}
        return file | ({} if file["oid"] in self.hub.large else {"actions": upload})

    def _commit(self, key: str, lines: list[dict[str, Any]]) -> None:
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, self.hub.commits.get(key, self.hub.commit)):
            self._send(412, b"{}", {})
            return
        for line in lines:
            if line["key"] == "file":
                kept = self._keep(key, line["value"]["path"], base64.b64decode(line["value"]["content"]))
                self.hub.pointers.pop(kept, None)
            elif line["key"] == "lfsFile":
                kept = self._keep(key, line["value"]["path"], self.hub.large[line["value"]["oid"]])
                self.hub.pointers[kept] = {"sha256": line["value"]["oid"], "size": line["value"]["size"]}
            elif line["key"] == "deletedFile":
                deleted = self.hub.repositories[key] / line["value"]["path"]
                deleted.unlink()
                self.hub.pointers.pop(deleted, None)
        self.hub.commits[key] = hashlib.sha1(json.dumps(lines).encode()).hexdigest()
        oid = self.hub.commits[key]
        self._reply({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{key}/commit/{oid}"})

    def _keep(self, key: str, name: str, content: bytes) -> Path:
        path = self.hub.repositories[key] / name
        path.write_bytes(content)
        return path

    def _reply(self, body: dict[str, Any]) -> None:
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _token(self) -> str:
        return str(self.headers.get("Authorization", "")).removeprefix("Bearer ")

    def _listing(self, key: str, revision: str) -> None:
        folder = self.hub.repositories.get(key)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", self.hub.commits.get(key, self.hub.commit)):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            files = [_entry(str(path.relative_to(folder)), path, self._pointer(path)) for path in paths]
            body = {"id": key.partition("/")[2], "sha": self.hub.commits.get(key, self.hub.commit), "siblings": files}
            self._send(200, json.dumps(body).encode(), {})

    def _pointer(self, path: Path) -> dict[str, Any] | None:
        """Entry of a large file in the listing."""
        large = path in self.hub.pointers or path.suffix in (".safetensors", ".parquet", ".png")
        return self.hub.pointers.get(path, _described(path)) if large else None

    def _file(self, key: str, name: str) -> None:
        path = self.hub.repositories[key] / name
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        content, described = path.read_bytes(), self._pointer(path) or _described(path)
        headers = {
            "X-Repo-Commit": self.hub.commits.get(key, self.hub.commit),
            "ETag": f'"{described["sha256"]}"',
        }
        if self.hub.corrupt(name):
            content = content[:-1] + bytes([content[-1] ^ 1])
        status = 200
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.command == "GET":
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[int(wanted[1]) :]
        self._send(status, content, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _described(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _entry(name: str, path: Path, pointer: dict[str, Any] | None) -> dict[str, Any]:
    if pointer is None:
        return {"rfilename": name, "size": path.stat().st_size}
    return {"rfilename": name, "size": pointer["size"], "lfs": {**pointer, "pointerSize": 130}}


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".png")) else "regular"
