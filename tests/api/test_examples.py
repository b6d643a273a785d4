"""Every example is a manifest that the API server admits, and those of jobs are read by the command line."""

from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane
from qlora_cli.manifest import load_job

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
JOBS = [path for path in EXAMPLES if "kind: QLoRAJob\n" in path.read_text()]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_admitted(plane: ControlPlane, path: Path) -> None:
    manifest = path.read_text().replace("namespace: demo", "namespace: default")
    assert "created" in plane.kubectl("apply", "--dry-run=server", "--filename=-", input_text=manifest)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_an_example_is_read_by_the_command_line(path: Path) -> None:
    assert load_job(path, "name a job").spec.model.source
