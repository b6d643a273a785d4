"""The catalog fits the code and tests; replays and samples separate caught mutants from survivors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.__main__ import main, replay, summary
from tests.mutants.mutant import Mutant, Verdict, mutated, node_ids, read_catalog, try_mutant, verdict_of
from tests.mutants.python_changes import parses
from tests.mutants.sample import changes_of, diff_of, draw, equivalents, key_of, measure, table

ROOT = Path(__file__).parents[3]
MUTANTS = read_catalog()


def test_the_catalog_fits_the_code_and_names_tests_that_exist() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        defect = mutated(mutant, text)
        assert defect != text
        assert parses(defect), mutant.name
        assert mutant.tests
    assert node_ids(ROOT, [test for mutant in MUTANTS for test in mutant.tests])


def test_each_equivalent_change_is_one_of_the_code_and_has_a_reason() -> None:
    for file, entries in equivalents(ROOT).items():
        text = (ROOT / file).read_text()
        known = {key_of(diff_of(change, text)) for change in changes_of(file, text)}
        assert set(entries) <= known, "update the entry in tests/mutants/equivalent.toml"
        assert all(entries.values())


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


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a < b", {"a <= b"}),
        ("a != b", {"a == b"}),
        ("a not in b", {"a in b"}),
        ("a and b", {"a or b", "(a)", "(b)"}),
        ("a or é or c", {"a and é or c", "a or é and c", "(é or c)", "(a or c)", "(a or é)"}),
        ("a - b", {"a + b"}),
        ("min(a)", {"max(a)", "pass"}),
        ("[7]", {"[8]", "[(6)]"}),
        ("[600, 0.5]", {"[1200, 0.5]", "[600, 1.0]"}),
        ("[True, 'word', 'for people']", {"[False, 'word', 'for people']", "[True, 'wordx', 'for people']"}),
        ("a(b, c=d, help=e)", {"a(b, help=e)", "pass"}),
        ("a if b else c", {"a if not (b) else c", "a if True else c", "a if False else c"}),
        ("[a for a in b if c]", {"[a for a in b if not (c)]", "[a for a in b if True]"}),
        (
            "if a := b():\n    raise c",
            {
                "if not (a := b()):\n    raise c",
                "if (a := b()) and False:\n    raise c",
                "if (a := b()) or True:\n    raise c",
                "if a := b():\n    pass",
            },
        ),
        ("def a(b=True):\n    return b", {"def a(b=False):\n    return b", "def a(b=True):\n    return None"}),
        ("a.b = c", {"pass"}),
        ("a += b", {"pass"}),
    ],
)
def test_each_operator_changes_a_module(text: str, changed: set[str]) -> None:
    assert {change.applied(text) for change in changes_of("module.py", text)} == changed


@pytest.mark.parametrize(
    "text",
    [
        '"""Words."""',
        "__all__ = ['word']",
        "a: Literal['word'] = b",
        "def a(b: c['word'] = d) -> c[7]: ...",
        "assert a == 7",
        "logger.info('word', a == 7)",
        "a = f'{b == 7}'",
        "if TYPE_CHECKING:\n    a = 7",
        "@dataclass(frozen=True)\nclass A:\n    b: c",
        "a = zip(b, c, strict=True)",
    ],
)
def test_what_is_for_people_or_type_checkers_is_not_changed(text: str) -> None:
    assert list(changes_of("module.py", text)) == []


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("a: true", {"a: false", ""}),
        ("replicas: 1", {"replicas: 2", ""}),
        ("verbs: [get, list]", {""}),
        ("  - get", {""}),
        ("kind: Role", {"kind: Rolex", ""}),
        (
            "{{- if and .a (eq .b 1) }}",
            {
                "{{- if not (and .a (eq .b 1)) }}",
                "{{- if or .a (eq .b 1) }}",
                "{{- if and .a (ne .b 1) }}",
            },
        ),
        ("a:\n  b: c", {"a:\n  b: cx", "a:\n"}),
        ("# a: true", set()),
        ("description: words", set()),
    ],
)
def test_each_operator_changes_the_chart(text: str, changed: set[str]) -> None:
    assert {change.applied(text) for change in changes_of("chart.yaml", text)} == changed


def test_a_seed_draws_the_same_changes_of_lines_that_stay(checkout: Path) -> None:
    module = checkout / "crds" / "qlora_api" / "module.py"
    module.parent.mkdir()
    module.write_text("".join(f"a{number} = {number}\n" for number in range(40)))
    drawn = draw(checkout, ["crds"], 10, 1)
    assert len({change.line for change in drawn}) == 10
    assert draw(checkout, ["crds"], 10, 1) == drawn
    assert draw(checkout, ["crds"], 10, 2) != drawn
    module.write_text("# A line more.\n" + module.read_text())
    assert [(change.line - 1, change.new) for change in draw(checkout, ["crds"], 10, 1)] == [
        (change.line, change.new) for change in drawn
    ]


TOY = """\
def half(number):
    return number / 2


def is_small(number):
    return number < 3


def unused(number):
    return number or None


def absolute(number):
    return -number if number < 0 else number
"""
TOY_TEST = "from qlora_api.toy import half, is_small\n\n\ndef test_it():\n    assert half(4) == 2 and is_small(1)\n"
EQUIVALENT = """\
["crds/qlora_api/toy.py"]
"return -number if number < 0 else number => return -number if number <= 0 else number" = "0 is -0"
"""


def test_a_sample_reports_the_rate_and_the_survivors(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {
        "crds/qlora_api/__init__.py": "",
        "crds/qlora_api/toy.py": TOY,
        "tests/unit/test_toy.py": TOY_TEST,
        "tests/unit/test_broken.py": TOY_TEST.replace("==", "!="),
        "tests/mutants/equivalent.toml": EQUIVALENT,
    }
    for file, text in written.items():
        (checkout / file).parent.mkdir(exist_ok=True)
        (checkout / file).write_text(text)
    tried = measure(checkout, checkout / "cache", ["crds"], 4, 1)
    said = capsys.readouterr().out.splitlines()
    verdicts = {one.change.line: str(one.verdict) for one in tried}
    assert verdicts == {2: "caught", 6: "SURVIVED", 10: "UNREACHED", 14: "equivalent"}
    survivor = said.index("  1 SURVIVED   crds/qlora_api/toy.py:6 off by one")
    assert said[survivor + 1 : survivor + 4] == [
        "    -    return number < 3",
        "    +    return number < (2)",
        "    passes 1 files of tests: test_toy.py; 1 files of tests not tried",
    ]
    assert said[-1] == "left out, as they fail without a change: tests/unit/test_broken.py"
    counts, rates = table(tried).splitlines()[0], table(tried).splitlines()[-1]
    assert dict(zip(counts.split(), rates.split()[1:], strict=True)) == {
        "caught": "1",
        "survived": "1",
        "unreached": "1",
        "equivalent": "1",
        "rate": "33%",
    }
