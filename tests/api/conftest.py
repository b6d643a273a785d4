"""A real API server with the CustomResourceDefinition, and nothing else: no operator, no webhook."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane, running
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with running() as plane:
        plane.kubectl.apply((ROOT / "crds" / "qlorajobs.qlora.dev.yaml").read_text())
        eventually(lambda: plane.kubectl("get", "qlorajobs") or True, seconds=60, what="the new kind")
        yield plane
