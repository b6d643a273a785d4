"""A real Prometheus with the scrape settings of a test."""

import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

from devcluster.addresses import free_port
from tests.support.waiting import eventually

Object = dict[str, Any]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[Object]:
        """The samples that the expression has now."""
        return list(self._get("query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """The value of its only sample; None if it has none."""
        samples = self.query(expression)
        assert len(samples) <= 1, samples
        return float(samples[0]["value"][1]) if samples else None

    def rules(self) -> list[Object]:
        """Every rule, with its health and its alerts."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> list[Object]:
        """Those that fire."""
        return [alert for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"]

    def _get(self, path: str, **parameters: str) -> Object:
        with _OPENER.open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=60) as answer:
            content = json.load(answer)
        assert content["status"] == "success", content
        assert not content.get("warnings"), content
        return dict(content["data"])


@contextmanager
def running_prometheus(
    program: Path, folder: Path, targets: Mapping[str, int], groups: Sequence[Object]
) -> Iterator[Prometheus]:
    """Start it, and scrape the ports on loopback each second until the block ends."""
    folder.mkdir(parents=True)
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": list(groups)}))
    scraped = [
        {"job_name": job, "honor_labels": True, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
        for job, port in targets.items()
    ]
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(folder / "rules.yaml")],
        "scrape_configs": scraped,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    command: list[str | Path] = [
        program,
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        server = Prometheus(f"http://{address}")
        eventually(
            lambda: len(server.query("up == 1")) == len(targets), seconds=60, every=0.2, what="a scrape of each target"
        )
        yield server
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def serving_metrics(text: str) -> Iterator[int]:
    """Answer each scrape with this text; the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - the name of the base class

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
