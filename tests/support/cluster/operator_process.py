"""The operator as a separate process, connected to a given address of the API server."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]


@dataclass
class OperatorProcess:
    """A running operator."""

    process: subprocess.Popen[bytes]
    log: Path
    probe_port: int
    metrics_port: int

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str, *, port: int | None = None, host: str = "127.0.0.1") -> tuple[int, str]:
        """Status and body of the operator's answer; 0 and the error without one."""
        url = f"http://{f'[{host}]' if ':' in host else host}:{port or self.probe_port}{path}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def is_ready(self) -> bool:
        return self.get("/readyz")[0] == 200

    def metric(self, name: str) -> float | None:
        """Value of a series, written as in the answer to a scrape."""
        lines = self.get("/metrics", port=self.metrics_port)[1].splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")]
        return float(values[0]) if values else None

    def wait_until_ready(self, seconds: float = 60) -> None:
        def ready() -> bool:
            assert self.alive, f"ended with {self.process.returncode}: {self.log.read_text()[-2000:]}"
            return self.is_ready()

        eventually(ready, seconds=seconds, every=0.1, what=f"the operator's readiness ({self.get('/readyz')[1]!r})")

    def entries(self) -> list[dict[str, Any]]:
        """Every line of the log. Raises AssertionError for one that is not a JSON object."""
        entries = []
        for line in self.log.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise AssertionError(f"not JSON: {line!r}") from error
            assert isinstance(entries[-1], dict), line
        return entries

    def says(self, words: str) -> bool:
        return any(words in entry["message"] for entry in self.entries())

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it as the kubelet does. Returns its exit status."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(120)
        finally:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running_operator(folder: Path, kubeconfig: Path, settings: Mapping[str, Any]) -> Iterator[OperatorProcess]:
    """Start it with these settings; it ends with the block."""
    folder.mkdir(parents=True)
    ports = {"probePort": free_port(), "metricsPort": free_port()}
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump({**settings, **ports}))
    log = folder / "log"
    path = [ROOT / "crds", ROOT / "operator"]
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "PYTHONPATH": os.pathsep.join(map(str, path))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_operator", "--settings", file],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
    operator = OperatorProcess(process, log, ports["probePort"], ports["metricsPort"])
    try:
        yield operator
    finally:
        if operator.alive:
            operator.stop()
