"""Rules for every test: a time limit, fixed inputs, a count of the tests left out, and a record of the cost."""

import json
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Seconds for one test with its fixtures, by folder: far above any test's need on two cores that ten programs share.
LIMITS = {
    "unit": 600,
    "devcluster": 600,
    "trainer": 1200,
    "gpu": 1200,
    "api": 900,
    "commands": 600,
    "cluster": 3600,
    "serving": 3600,
    "door": 600,
}

# A timing on a busy machine proves nothing about the code, and a random input fails in an unrelated change. Use `make
# test-all` (with the profile `explore`) and `make fuzz` to find new inputs.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("same")

_left_out = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of the record that tests/suites.py reads."""
    parser.addoption("--spent", type=Path, metavar="FILE", help="write cost and skipped tests to this file")


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
    """Report the number of tests left out, and the command that runs them; record the cost."""
    if left_out := config.stash.get(_left_out, 0):
        terminalreporter.write_line(f"{left_out} tests were deselected; `make test-all` runs them too")
    if config.option.spent:
        config.option.spent.parent.mkdir(parents=True, exist_ok=True)
        config.option.spent.write_text(json.dumps(spent(terminalreporter.stats)))


def spent(stats: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The fields of `Spent` in tests/suites.py, once the processes of pytest-xdist have ended."""
    reports = [each for found in stats.values() for each in found if isinstance(each, pytest.TestReport)]
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    reasons = {each.nodeid: str(each.longrepr[2]) for each in stats.get("skipped", [])}
    return {
        "tests": len({each.nodeid for each in reports}),
        "processor": sum(each.ru_utime + each.ru_stime for each in usage),
        "seconds": sum(each.duration for each in reports),
        "skipped": {test: reason.removeprefix("Skipped: ") for test, reason in reasons.items()},
    }
