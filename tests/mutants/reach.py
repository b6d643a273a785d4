"""Finds the tests that reach a line of the product: near ones by imports, then by measured coverage.

A file of tests runs once under coverage without a mutant: it has to pass, and the lines that it and its processes run
are kept in the cache of this machine until one of those files changes.
"""

import ast
import hashlib
import json
import re
import resource
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from coverage import CoverageData

from tests.mutants.mutant import PACKAGES, run_tests
from tests.mutants.python_changes import Change

SUITES = {
    "operator": ("tests/unit", "tests/api"),
    "trainer_image": ("tests/unit", "tests/trainer", "tests/commands"),
    "cli": ("tests/unit", "tests/commands", "tests/trainer/cli", "tests/api"),
    "door": ("tests/unit", "tests/api/door"),
    "serving": ("tests/unit",),
    "crds": ("tests/unit", "tests/api", "tests/trainer"),
    "helm": ("tests/api/chart", "tests/unit/project"),
}
"""For a folder of the product, from the fastest. Those that need pods are left out."""
CHART = "helm/qlora-operator"
_READS_THE_CHART = re.compile(r"""["']helm["'] / ["']qlora-operator["']|CHART\b""")
_CONFIGURATION = """\
[run]
source = crds/qlora_api, cli, door, operator, serving, trainer_image/qlora_trainer, tests
patch = subprocess
sigterm = true
parallel = true
data_file = {data}
disable_warnings = no-data-collected, module-not-measured
"""


@dataclass(frozen=True)
class Reach:
    """The outcome of one file of tests without a mutant."""

    has_passed: bool
    cpu_s: float
    lines: dict[str, list[int]]
    """By file, relative to the checkout."""
    digest: str
    """Of the contents of these files."""

    def reaches(self, change: Change) -> bool:
        """Whether these tests run its statement."""
        first, last = sorted((change.statement, change.line))
        return any(first <= line <= last for line in self.lines.get(change.file, ()))


class Tests:
    """The tests of a copy of the sources."""

    def __init__(self, copy: Path, cache: Path) -> None:
        self._copy, self._cache = copy, cache
        self._known: dict[str, Reach] = {}
        cache.mkdir(parents=True, exist_ok=True)

    def near(self, file: str) -> list[str]:
        """The files of tests that import a file of the product, the nearest and fastest first."""
        steps = {file: 0}
        waiting = deque([file])
        while waiting:
            current = waiting.popleft()
            for importer in self._importers[current]:
                if importer not in steps:
                    steps[importer] = steps[current] + 1
                    waiting.append(importer)
        suites = SUITES[Path(file).parts[0]]
        # The golden renderings show any change of a template.
        stem = "rendered" if file.startswith(f"{CHART}/templates/") else Path(file).stem.strip("_")
        folders = {*Path(file).parts}

        def order(test: str) -> tuple[object, ...]:
            suite = next(number for number, name in enumerate(suites) if test.startswith(name))
            return stem not in Path(test).stem, -len(folders & {*Path(test).parts}), suite, steps[test], test

        return sorted((test for test in steps if re.match(rf"({'|'.join(suites)})/.*\btest_", test)), key=order)

    def reach(self, test: str) -> Reach | None:
        """The lines that a file of tests reaches, if it has been measured on these sources."""
        path = self._file_of(test)
        if test not in self._known and path.exists():
            reach = Reach(**json.loads(path.read_text()))
            if reach.digest == self._digest(reach.lines):
                self._known[test] = reach
        return self._known.get(test)

    def measure(self, test: str) -> Reach:
        """Run a file of tests under coverage, and keep what it reaches."""
        lines = {test: [1]}
        with tempfile.TemporaryDirectory(dir=self._cache) as name:
            folder = Path(name)
            (folder / "coveragerc").write_text(_CONFIGURATION.format(data=folder / "data"))
            before = _cpu_s()
            code = run_tests(self._copy, [test], folder / "log", coverage=folder / "coveragerc")
            cpu_s = _cpu_s() - before
            for part in folder.glob("data.*"):
                data = CoverageData(str(part))
                data.read()
                for measured in data.measured_files():
                    # Empty for a file that has not been imported.
                    if run := data.lines(measured):
                        file = str(Path(measured).relative_to(self._copy))
                        lines[file] = sorted({*lines.get(file, ()), *run})
            reach = Reach(code == 0, cpu_s, lines, self._digest(lines))
            # A failure may be due to what this machine lacks today.
            if reach.has_passed:
                (folder / "reach.json").write_text(json.dumps(asdict(reach)))
                (folder / "reach.json").replace(self._file_of(test))
        self._known[test] = reach
        return reach

    def _file_of(self, test: str) -> Path:
        return self._cache / f"{test.replace('/', '.')}.json"

    def broken(self) -> list[str]:
        """The files of tests that fail without a change, or cannot run here."""
        return sorted(test for test, reach in self._known.items() if not reach.has_passed)

    def _digest(self, files: Iterable[str]) -> str:
        digest = hashlib.sha256()
        for file in sorted(files):
            path = self._copy / file
            digest.update(path.read_bytes() if path.exists() else b"")
        return digest.hexdigest()

    @cached_property
    def _importers(self) -> dict[str, set[str]]:
        """By file, the files that import it, start it as a process or read it."""
        files = {_module(path): path for path in _python_files(self._copy)}
        chart = [str(path.relative_to(self._copy)) for path in (self._copy / CHART).rglob("*") if path.is_file()]
        importers: dict[str, set[str]] = defaultdict(set)
        for module, path in files.items():
            text = (self._copy / path).read_text()
            for name in _names(module, ast.parse(text)):
                if name in files and not str(path).endswith("conftest.py"):
                    importers[str(files[name])].add(str(path))
            if _READS_THE_CHART.search(text):
                for file in chart:
                    importers[file].add(str(path))
        return importers


def _python_files(copy: Path) -> Iterator[Path]:
    for folder in (*PACKAGES[:-1], "devcluster", "helm", "tests"):
        yield from (path.relative_to(copy) for path in sorted((copy / folder).rglob("*.py")))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[1:] if parts[0] in PACKAGES else parts).removesuffix(".__init__")


def _names(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules that a module may name: in imports and in strings."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str() as source, names=names):
                yield source
                yield from (f"{source}.{alias.name}" for alias in names)
            case ast.Constant(value=str() as text) if found := re.fullmatch(r"(\w+(?:\.\w+)*)(?::\w+)?", text):
                yield from (found[1], f"{found[1]}.__main__", f"{module.partition('.')[0]}.{found[1]}")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
