"""Rules for every test: a time limit, fixed inputs, and a count of the tests left out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Seconds for one test with its fixtures, by folder, on a machine of two busy cores: far above any test's need.
LIMITS = {"unit": 120, "devcluster": 120, "trainer": 600, "gpu": 1200, "api": 300, "commands": 300, "cluster": 1200}

# A timing on a busy machine proves nothing about the code, and a random input fails in an unrelated change. Use `make
# test-all` (with the profile `explore`) and `make fuzz` to find new inputs.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("same")

_left_out = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the time limit of its folder, unless it names another."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMITS[item.path.relative_to(here).parts[0]]))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the tests that are left out."""
    if items:
        config = items[0].config
        config.stash[_left_out] = config.stash.get(_left_out, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the count to the reporting process, if pytest-xdist runs several."""
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["left_out"] = session.config.stash.get(_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Keep the count of a process that has tested: each collects all tests."""
    # A crashed process has sent nothing.
    told: dict[str, Any] = getattr(node, "workeroutput", {})
    node.config.stash[_left_out] = max(node.config.stash.get(_left_out, 0), told.get("left_out", 0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report the number of tests left out, and the command that runs them."""
    if left_out := config.stash.get(_left_out, 0):
        terminalreporter.write_line(f"{left_out} tests were deselected; `make test-all` runs them too")
