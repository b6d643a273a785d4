"""The walk of the documentation, command by command, with a tiny model in place of the demo's."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import layout, product
from examples.walk.preparation import prepared
from examples.walk.runner import Shell, run
from examples.walk.steps import WALK
from tests.cluster.environment import Cluster

# Optimizer steps: ten a second on two cores. The job that is suspended must not have ended by then: its first progress
# is seen within ten seconds.
_SUSPENDED, _OTHER = 500, 40


@pytest.fixture
def shell(installed: Cluster, tiny_model: Path, tmp_path: Path) -> Iterator[Shell]:
    """Prepare a user's shell in the cluster, which removes and installs the operator."""
    where = layout.from_environment()
    try:
        with prepared(where, installed.images, tiny_model, tmp_path / "walk", Path(sys.executable).parent) as found:
            yield found
    finally:
        product.uninstall(where, where.kubeconfig)
        product.install(where, where.kubeconfig, installed.images)


def show(text: str) -> None:
    """For pytest, which prints it if the test fails."""
    sys.stdout.write(text)


def test_the_walk_leads_from_installation_to_removal(
    installed: Cluster, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    steps = [
        step.with_values({"steps": str(_OTHER if "--name rank-2 " in step.script else _SUSPENDED)}) for step in WALK
    ]
    recorded = list(run(steps, shell, show))
    assert [each.step for each in recorded] == steps
    definitions = installed.kubectl("get", "crd", "--output=name")
    assert "qlora.dev" not in definitions
    assert (shell.folder / "curves.svg").stat().st_size > 0
