"""The parts of the server of Weights & Biases that its client needs for an upload."""

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class WandbStub:
    """Requests of a client."""

    def __init__(self) -> None:
        self.url = ""
        self.authorizations: set[str] = set()
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        """The lines of each run's history, by its path and their number, as the server overwrites them."""

    def answer(self, path: str, body: bytes) -> Any:
        """The answer to a request."""
        if path == "/graphql":
            return {"data": self._graphql(json.loads(body))}
        if path.endswith("/file_stream"):
            self._take(path.removeprefix("/files/").removesuffix("/file_stream"), json.loads(body))
        return {}

    def _graphql(self, request: dict[str, Any]) -> Any:
        query, given = request["query"], request["variables"]
        if "upsertBucket" in query:
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "team"}}
            run = {"id": "r", "name": given["name"], "displayName": given["displayName"], "project": project}
            lengths = {"historyLineCount": 0, "eventsLineCount": 0, "logLineCount": 0}
            return {"upsertBucket": {"bucket": {**run, **lengths}, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/uploads/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _take(self, run: str, sent: dict[str, Any]) -> None:
        for name, part in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                lines = {part["offset"] + number: json.loads(line) for number, line in enumerate(part["content"])}
                self.history.setdefault(run, {}).update(lines)


@contextmanager
def wandb_stub() -> Iterator[WandbStub]:
    """The server, running."""
    stub = WandbStub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if given := self.headers.get("Authorization"):
                stub.authorizations.add(given)
            answer = json.dumps(stub.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_PUT(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
