"""What the GPU tests measure is written with the card that measured it, and becomes a table of the documentation."""

import json

import pytest

from tests.gpu.cards import Card
from tests.gpu.figures import Figures, report, table

H100 = Card("NVIDIA H100", (9, 0), 79.11)
pytest_plugins = ["pytester"]


def test_the_file_says_what_was_measured_on_which_card_with_which_libraries() -> None:
    figures = Figures("test_paper.py::test_65b")
    figures.add("peak memory", 44.21, "GB", limit=45.0)
    figures.add("speed", 3512.7, "tokens/s")
    outcomes = {"test_paper.py::test_65b": "passed", "test_a.py::test_b": "failed", "test_c.py::test_d": "needs 2 GPUs"}

    found = report(figures.kept, [H100], {"torch": "2.15.0"}, outcomes, date="2026-11-27", seconds=401.26)

    assert json.loads(json.dumps(found)) == {
        "card": "NVIDIA H100",
        "cards": [{"name": "NVIDIA H100", "capability": "9.0", "memoryGiB": 79.11}],
        "versions": {"torch": "2.15.0"},
        "date": "2026-11-27",
        "seconds": 401.3,
        "passed": 1,
        "failed": ["test_a.py::test_b"],
        "skipped": {"test_c.py::test_d": "needs 2 GPUs"},
        "figures": [
            {"test": "test_paper.py::test_65b", "name": "peak memory", "value": 44.21, "unit": "GB", "limit": 45.0},
            {"test": "test_paper.py::test_65b", "name": "speed", "value": 3512.7, "unit": "tokens/s"},
        ],
    }


@pytest.mark.parametrize(("peak", "met"), [(44.21, "met"), (45.2, "**missed**")])
def test_the_table_says_which_limit_was_met_and_what_did_not_pass(peak: float, met: str) -> None:
    figures = Figures("test_paper.py::test_65b")
    figures.add("peak memory", peak, "GB", limit=45.0)
    figures.add("speed", 3512.7, "tokens/s")
    outcomes = {"test_paper.py::test_65b": "passed", "test_a.py::test_b": "failed"}
    found = json.loads(json.dumps(report(figures.kept, [H100], {}, outcomes, date="2026-11-27", seconds=401.26)))

    lines = table(found).splitlines()

    assert lines[0] == "NVIDIA H100, 2026-11-27: 1 tests passed, 1 failed, 0 skipped, in 401 s."
    assert f"| peak memory | {peak:.4g} GB | 45 GB, {met} | `test_paper.py::test_65b` |" in lines
    assert "| speed | 3,513 tokens/s | none | `test_paper.py::test_65b` |" in lines


TESTS = """
import pytest

def test_measures(figures):
    figures.add("speed", 12.5, "tokens/s")

def test_fails():
    assert False

@pytest.mark.gpu(cards=2)
def test_of_two():
    pass
"""
ONE_CARD = """
from tests.gpu import conftest
from tests.gpu.conftest import *
from tests.gpu.cards import Card

conftest._cards = lambda: (Card("NVIDIA H100", (9, 0), 79.11),)
conftest._is_ours = lambda path: True
"""


def test_a_session_with_a_card_writes_what_its_tests_have_measured(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest(ONE_CARD)
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("QLORA_GPU_FIGURES", str(pytester.path / "here.json"))

    done = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    done.stdout.fnmatch_lines(["*measured on NVIDIA H100*", "speed: 12.5 tokens/s", "1 figures are in *here.json"])
    found = json.loads((pytester.path / "here.json").read_text())
    assert found["card"] == "NVIDIA H100"
    assert [(figure["name"], figure["value"]) for figure in found["figures"]] == [("speed", 12.5)]
    assert found["passed"] == 1
    assert [test.partition("::")[2] for test in found["failed"]] == ["test_fails"]
    assert "needs 2 CUDA GPUs" in "".join(found["skipped"].values())
