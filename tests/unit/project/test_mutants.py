"""The mutants fit the current code and tests, and a replay separates caught mutants from survivors."""

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.__main__ import main, replay, summary
from tests.mutants.mutant import Mutant, Verdict, mutated, node_ids, read_catalog, try_mutant, verdict_of

ROOT = Path(__file__).parents[3]
MUTANTS = read_catalog()


def test_the_catalog_fits_the_code_and_names_tests_that_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        defect = mutated(mutant, text)
        assert defect != text
        assert ast.parse(defect), mutant.name
        assert mutant.tests
    assert node_ids(ROOT, [test for mutant in MUTANTS for test in mutant.tests])


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one function and one test."""
    (tmp_path / "crds").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "crds" / "toy.py").write_text("def double(number):\n    return number * 2\n")
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from toy import double\n\n\ndef test_two() -> None:\n    assert double(2) == 4\n"
    )
    # Plugins take most of pytest's startup time.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path


TRIPLE = Mutant("triple", "crds/toy.py", "number * 2", "number * 3", ("test_two",))
# As good as doubling for 2, and as long: bytecode of one would be taken for the other's.
ADD = replace(TRIPLE, name="add", new="number + 2")


def test_replaying_reports_caught_mutants_and_fails_if_one_survives(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*.py")}
    assert replay([TRIPLE, ADD], checkout) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("caught    triple")
    assert lines[1].startswith("SURVIVED  add")
    assert "tests/test_toy.py::test_two" in lines[2]
    assert lines[-1] == "1 caught, 1 survived"
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_a_test_that_fails_anyway_catches_nothing(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "tests" / "test_toy.py").write_text("def test_two() -> None:\n    assert False\n")
    assert replay([TRIPLE], checkout) == 1
    assert capsys.readouterr().out.startswith("the tests do not pass without a mutant:")


@pytest.mark.parametrize(("old", "found"), [("number * 4", 0), ("number", 2)])
def test_a_mutant_whose_text_does_not_occur_exactly_once_has_drifted(old: str, found: int, checkout: Path) -> None:
    verdict, why = try_mutant(replace(TRIPLE, old=old), checkout, checkout / "pytest.log")
    assert verdict is Verdict.DRIFTED
    assert f"crds/toy.py has {found} occurrences of {old!r}" in why


@pytest.mark.parametrize(
    ("code", "verdict"),
    [(1, "caught"), (0, "SURVIVED"), (2, "BROKEN"), (4, "BROKEN"), (5, "BROKEN"), (-9, "BROKEN"), (None, "BROKEN")],
)
def test_only_a_failed_test_catches_a_mutant(code: int | None, verdict: str) -> None:
    """Not a collection that fails, a test that is not there, or one that hangs."""
    assert verdict_of(code) == verdict


def test_the_summary_counts_unexpected_outcomes() -> None:
    verdicts = Counter({Verdict.CAUGHT: 3, Verdict.DRIFTED: 2, Verdict.BROKEN: 1})
    assert summary(verdicts) == "3 caught, 0 survived, 2 drifted, 1 broken"


def test_an_unknown_name_is_answered_with_the_existing_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no-such-mutant"])
    said = capsys.readouterr().err
    assert "no mutant named no-such-mutant" in said
    assert MUTANTS[0].name in said
