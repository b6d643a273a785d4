"""A real API server with the CustomResourceDefinitions: on its own, or with the operator and without a node."""

from collections.abc import Iterator
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane, running
from tests.support.definitions import apply_definitions
from tests.support.nodeless import Nodeless, nodeless


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    """Nothing else: no operator, no controllers, no webhook."""
    with running() as plane:
        apply_definitions(plane)
        yield plane


@pytest.fixture(scope="session")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodeless]:
    """With the controllers and the operator: tests write what a kubelet would."""
    with nodeless(tmp_path_factory.mktemp("nodeless")) as cluster:
        yield cluster


TABLE = pytest.StashKey[list[str]]()
"""Lines for the end of the output."""


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that reports, if this is one of several that test (pytest-xdist)."""
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["table"] = session.config.stash.get(TABLE, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Keep the lines of a process that has tested."""
    node.config.stash.setdefault(TABLE, []).extend(getattr(node, "workeroutput", {}).get("table", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what tests have measured."""
    for line in config.stash.get(TABLE, []):
        terminalreporter.write_line(line)
