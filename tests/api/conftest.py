"""A real API server with the CustomResourceDefinitions, optionally with the operator."""

from collections.abc import Iterator

import pytest

from devcluster.controlplane import ControlPlane, running
from tests.support.cluster.nodeless import DEFAULT_PROFILE, Nodeless, apply_definitions, nodeless


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    """With one profile, and nothing else: no operator, no controllers, no webhook."""
    with running() as plane:
        apply_definitions(plane, default=DEFAULT_PROFILE)
        yield plane


@pytest.fixture(scope="session")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodeless]:
    """With the controllers and the operator: tests write what a kubelet would."""
    with nodeless(tmp_path_factory.mktemp("nodeless")) as cluster:
        yield cluster
