"""A real MLflow server over a database in a folder, for the tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from devcluster.addresses import LOOPBACK, free_port
from tests.support.waiting import eventually


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run MLflow's own application in Flask's server, on SQLite. Yield its address."""
    port = free_port()
    address = f"http://{LOOPBACK}:{port}"
    environment = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'runs.db'}",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder / "artifacts"),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "flask", "--app", "mlflow.server:app"),
            *("run", "--host", LOOPBACK, "--port", str(port)),
        ],
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: _answers(address), seconds=120, every=0.1, what=f"MLflow at {address}")
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urlopen(f"{address}/health") as answer:
            return bool(answer.status == 200)
    except URLError:
        return False
