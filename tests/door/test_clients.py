"""Unmodified clients that others have written, each in a separate environment: `make test-door`."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane
from tests.support.door import MODEL, ROWS, DoorProcess, Tenant, add_tenant

HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("QLORA_DOOR_CLIENTS", ""))
pytestmark = pytest.mark.skipif(Path() == CLIENTS, reason="the clients are installed by `make test-door`")
WALKS = {
    "openai-1": "openai_walk.py",
    "openai-3": "openai_walk.py",
    "wandb": "openai_walk.py",
    "litellm": "litellm_walk.py",
    "dspy": "dspy_walk.py",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_bytes(ROWS)
    return path


def environment(door: DoorProcess, tenant: Tenant) -> dict[str, str]:
    """The variables that such programs read."""
    address = {"OPENAI_BASE_URL": door.url, "OPENAI_API_BASE": door.url, "OPENAI_API_KEY": tenant.key()}
    return {**os.environ, **address, "WANDB_MODE": "offline", "PYTHONPATH": "", "NO_PROXY": "127.0.0.1"}


def walk(command: list[str | Path], variables: dict[str, str], folder: Path) -> str:
    """The output of a walk that ends well."""
    done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(("client", "script"), [*WALKS.items(), ("wandb", "wandb_walk.py")])
def test_a_client_fine_tunes(
    client: str, script: str, door: DoorProcess, tenant: Tenant, rows: Path, tmp_path: Path
) -> None:
    python = CLIENTS / client / "bin" / "python"
    output = walk([python, HERE / "walks" / script, rows, MODEL], environment(door, tenant), tmp_path)
    assert re.search(r"^.*team-a/ftjob-[-a-z0-9]+@sha256:[0-9a-f]{64}$", output, re.M)


def test_the_client_for_node_fine_tunes(door: DoorProcess, tenant: Tenant, rows: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [
        "node",
        HERE / "walks" / "node_walk.mjs",
        rows,
        MODEL,
        CLIENTS / "node" / "node_modules",
    ]
    assert "team-a/ftjob-node-" in walk(command, environment(door, tenant), tmp_path)


def test_the_command_line_of_instructor_fine_tunes(
    door: DoorProcess, plane: ControlPlane, rows: Path, tmp_path: Path
) -> None:
    # Their jobs do not end.
    program, variables = CLIENTS / "instructor" / "bin" / "instructor", environment(door, add_tenant(plane, "team-b"))
    walk([program, "files", "upload", rows], variables, tmp_path)
    listed = walk([program, "files", "list"], {**variables, "COLUMNS": "200"}, tmp_path)
    file = re.search(r"file-[0-9a-f]{24}", listed)
    assert file is not None
    # It shows a table until it is interrupted.
    log = tmp_path / "jobs.log"
    command: list[str | Path] = [program, "jobs", "create-from-id", file[0], "--model", MODEL, "--n-epochs", "2"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**variables, "COLUMNS": "300"}, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (job := re.search(r"ftjob-[0-9a-f]{12}", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
    assert "cancelled successfully" in walk([program, "jobs", "cancel", job[0]], variables, tmp_path)
    walk([program, "files", "delete", file[0]], variables, tmp_path)
