"""Draws small changes of the product by a seed, and reports how many of them the tests notice.

The same seed draws the same changes from lines that have not changed. Each line that can be changed is as likely as any
other, so a package is drawn as often as its length says.
"""

import difflib
import hashlib
import re
import tempfile
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.chart_changes import chart_changes
from tests.mutants.mutant import Verdict, copy_sources, run_tests, with_text
from tests.mutants.python_changes import Change, parses, python_changes
from tests.mutants.reach import CHART, Tests

PRODUCT = {
    "operator": ("operator/qlora_operator/**/*.py",),
    "trainer": ("trainer_image/qlora_trainer/**/*.py",),
    "cli": ("cli/qlora_cli/**/*.py", "cli/qlora_client/**/*.py"),
    "door": ("door/qlora_door/**/*.py",),
    "serving": ("serving/qlora_vllm/**/*.py",),
    "crds": ("crds/qlora_api/**/*.py",),
    "chart": (
        f"{CHART}/templates/*.yaml",
        f"{CHART}/templates/*.tpl",
        f"{CHART}/values.yaml",
        f"{CHART}/files/al*.yaml",
    ),
}
EQUIVALENT = "tests/mutants/equivalent.toml"
NEAREST, FIRST = 3, 30
"""Files of tests that are tried first: the nearest, and those with unit tests."""
BUDGET_S = 120
"""CPU time of the tests that one change may cost, by their time without it."""
MEASURING_S = 120
"""CPU time to measure tests for one change. Those beyond are not tried."""


@dataclass(frozen=True)
class Tried:
    """A change and what came of it."""

    change: Change
    diff: str
    verdict: Verdict
    tests: tuple[str, ...]
    """The one that failed, or those that passed."""
    untried: int = 0
    """Files of tests that may reach the line too: beyond the budget, or failing without a change."""


def changes_of(file: str, text: str) -> Iterator[Change]:
    """Each change of a file."""
    return python_changes(file, text) if file.endswith(".py") else chart_changes(file, text)


def draw(checkout: Path, packages: Iterable[str], count: int, seed: int) -> list[Change]:
    """Draw that many lines, and one change of each."""
    by_line: dict[str, list[Change]] = defaultdict(list)
    texts: dict[str, str] = {}
    for path in sorted(path for name in packages for glob in PRODUCT[name] for path in checkout.glob(glob)):
        file, text = str(path.relative_to(checkout)), path.read_text()
        texts[file] = text
        lines, seen = text.splitlines(), Counter[str]()
        keys = [f"{file} {line.strip()} {seen.update([line]) or seen[line]}" for line in lines]
        for change in changes_of(file, text):
            by_line[keys[change.line - 1]].append(change)
    drawn: list[Change] = []
    for key in sorted(by_line, key=lambda key: _rank(seed, key)):
        for _, change in sorted(enumerate(by_line[key]), key=lambda one: _rank(seed, key, one[0])):
            if not change.file.endswith(".py") or parses(change.applied(texts[change.file])):
                drawn.append(change)
                break
        if len(drawn) == count:
            break
    return drawn


def _rank(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def diff_of(change: Change, text: str) -> str:
    """The changed lines, the old ones before the new ones."""
    lines = difflib.unified_diff(text.splitlines(), change.applied(text).splitlines(), lineterm="", n=0)
    return "\n".join(line for line in lines if re.match(r"[-+](?![-+]{2} )", line))


def equivalents(checkout: Path) -> dict[str, dict[str, str]]:
    """By file and change, as `key_of` writes it, the reason that no test can notice it."""
    return tomllib.loads((checkout / EQUIVALENT).read_text())


def key_of(diff: str) -> str:
    """A diff in one line: `old => new`."""
    sides = {sign: [line[1:].strip() for line in diff.splitlines() if line[0] == sign] for sign in "-+"}
    return f"{' '.join(sides['-'])} => {' '.join(sides['+'])}"


def attempt(change: Change, copy: Path, tests: Tests, log: Path) -> Tried:
    """Try a change on the tests that reach it, until one fails."""
    text = (copy / change.file).read_text()
    diff = diff_of(change, text)
    if key_of(diff) in equivalents(copy).get(change.file, {}):
        return Tried(change, diff, Verdict.EQUIVALENT, ())
    untried: list[str] = []
    # The nearest and the fastest catch most, and need not be measured for that.
    near = tests.near(change.file)
    first = [test for place, test in enumerate(near) if place < NEAREST or test.startswith("tests/unit/")]
    if failed := _failure(change, copy, first[:FIRST], log):
        return Tried(change, diff, Verdict.CAUGHT, (failed,))
    reaching = tuple(_reaching(change, tests, untried))
    if failed := _failure(change, copy, [test for test in reaching if test not in first[:FIRST]], log):
        return Tried(change, diff, Verdict.CAUGHT, (failed,))
    return Tried(change, diff, Verdict.SURVIVED if reaching else Verdict.UNREACHED, reaching, len(untried))


def _reaching(change: Change, tests: Tests, untried: list[str]) -> Iterator[str]:
    """The files of tests that run the statement, the nearest first; notes those that may, and are left out."""
    if change.file.startswith(CHART):
        # Coverage does not show which tests read it.
        yield from tests.near(change.file)
        return
    spent = measuring = 0.0
    for test in tests.near(change.file):
        reach = tests.reach(test)
        if reach is None and measuring < MEASURING_S and spent < BUDGET_S:
            reach = tests.measure(test)
            measuring += reach.cpu_s
        if reach is None or not reach.has_passed or (reach.reaches(change) and spent >= BUDGET_S):
            untried.append(test)
        elif reach.reaches(change):
            spent += reach.cpu_s
            yield test


def _failure(change: Change, copy: Path, files: Sequence[str], log: Path) -> str:
    """The first test that fails with the change, and passes without it; empty if none does."""
    left = list(files)
    path = copy / change.file
    while left:
        with with_text(path, change.applied(path.read_text())):
            code = run_tests(copy, left, log, seconds=10 * BUDGET_S)
        if code == 0:
            break
        found = re.search(r"^(?:FAILED|ERROR) (\S+?\.py)(\S*(?: (?!- ).*?)?)(?= - |$)", log.read_text(), re.MULTILINE)
        if code is None or found is None:
            return f"{left[0]} (did not end)" if code is None else left[0]
        failed = found[1] + found[2]
        if run_tests(copy, [failed], log) != 1:
            return failed
        # Fails anyway at times: it shows nothing.
        left.remove(found[1])
    return ""


def measure(checkout: Path, cache: Path, packages: Sequence[str], count: int, seed: int) -> list[Tried]:
    """Try a sample on a copy of the checkout, and print each verdict as it is known."""
    changes = draw(checkout, packages, count, seed)
    tried: list[Tried] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy, log = Path(folder) / "copy", Path(folder) / "pytest.log"
        copy_sources(checkout, copy)
        tests = Tests(copy, cache)
        for number, change in enumerate(changes, 1):
            one = attempt(change, copy, tests, log)
            tried.append(one)
            by = f" {one.tests[0]}" if one.verdict is Verdict.CAUGHT else ""
            print(f"{number:3} {one.verdict:10} {change.file}:{change.line} {change.kind}{by}", flush=True)  # noqa: T201
            if one.verdict in (Verdict.SURVIVED, Verdict.UNREACHED):
                print("\n".join(_explained(one)), flush=True)  # noqa: T201
        if broken := tests.broken():
            print("left out, as they fail without a change: " + ", ".join(broken))  # noqa: T201
    return tried


def _explained(tried: Tried) -> Iterator[str]:
    """A survivor: the change, and which tests it passes."""
    yield from (f"    {line}" for line in tried.diff.splitlines())
    more = f"; {tried.untried} files of tests not tried" if tried.untried else ""
    names = [Path(test).name for test in tried.tests]
    yield f"    passes {len(names)} files of tests: {', '.join(names[:6])}{more}" if names else f"    no test{more}"


def table(tried: Sequence[Tried]) -> str:
    """The rate by package and in total. Equivalent changes do not count."""
    verdicts = (Verdict.CAUGHT, Verdict.SURVIVED, Verdict.UNREACHED, Verdict.EQUIVALENT)
    rows = [" " * 10 + "".join(f"{verdict.lower():>12}" for verdict in verdicts) + f"{'rate':>8}"]
    groups = {name: [one for one in tried if _package(one.change.file) == name] for name in PRODUCT} | {"all": tried}
    for name, group in groups.items():
        counts = Counter(one.verdict for one in group)
        if judged := len(group) - counts[Verdict.EQUIVALENT]:
            numbers = "".join(f"{counts[verdict]:12}" for verdict in verdicts)
            rows.append(f"{name:10}{numbers}{counts[Verdict.CAUGHT] / judged:8.0%}")
    return "\n".join(rows)


def _package(file: str) -> str:
    return next(name for name, globs in PRODUCT.items() if file.startswith(globs[0].partition("/")[0] + "/"))
