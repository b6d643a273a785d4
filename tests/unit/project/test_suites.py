"""A suite that costs too much, is missing, or skips a test for a new reason fails `make test`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest, suites
from tests.suites import FACTOR, Spent, findings

EXPECTED = {
    "cost": {"unit": {"processor": 100}, "cluster": {"seconds": 100}},
    "skips": {r"needs \d CUDA GPU": "none here"},
}
MOST, LONGEST = (100 * FACTOR[kind] for kind in ("processor", "seconds"))
WITHIN = {"unit": Spent(3, MOST, 999, {}), "cluster": Spent(3, 999, LONGEST, {})}


def test_each_suite_is_held_against_its_own_kind_of_cost() -> None:
    assert findings(WITHIN, EXPECTED, limits=True) == []
    more = {"unit": Spent(3, MOST + 1, 1, {}), "cluster": Spent(3, 1, LONGEST + 1, {})}
    (unit, cluster) = findings(more, EXPECTED, limits=True)
    assert "unit: 201 s (processor), may be 200 s" in unit
    assert "cluster: 401 s (seconds), may be 400 s" in cluster
    assert findings(more, EXPECTED, limits=False) == []


def test_a_suite_that_has_not_run_is_a_finding() -> None:
    assert findings({"unit": WITHIN["unit"]}, EXPECTED, limits=True) == ["cluster: has not run"]


def test_only_a_listed_reason_may_skip_a_test() -> None:
    skipped = {"gpu/test_a.py::test_b": "needs 2 CUDA GPUs", "test_c.py::test_d": "no namespaces here"}
    (found,) = findings({"gpu": Spent(2, 1, 1, skipped)}, EXPECTED, limits=False)
    assert found == "test_c.py::test_d: skipped (no namespaces here), which suites.toml does not list"


def test_a_session_records_the_work_of_its_children_and_its_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("tests/test_some.py", 3, "test_that_waits")
    skip = pytest.TestReport(
        "test_that_waits", where, {}, "skipped", (*where[:2], "Skipped: no moon"), "setup", (), 0.5
    )
    before = conftest.spent({})
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass"], check=True)
    after = conftest.spent({"skipped": [skip]})
    assert after["processor"] - before["processor"] >= 0.3
    recorded = Spent(**after)
    assert (recorded.tests, recorded.seconds, recorded.skipped) == (1, 0.5, {"test_that_waits": "no moon"})
    (tmp_path / "some.json").write_text(json.dumps(after))
    assert suites.main([str(tmp_path), "--no-limits"]) == 1
    assert "test_that_waits: skipped (no moon)" in capsys.readouterr().out
