"""Reads the catalog, applies a mutant to a copy of the sources and reports whether the tests notice."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

CATALOG = Path(__file__).with_name("catalog.toml")
NOT_COPIED = (".git", ".*_cache", "__pycache__", ".venv", "fuzz-crashes", "shared", "site")
PACKAGES = ("crds", "cli", "door", "operator", "serving", "trainer_image", ".")
"""Folders to import from, relative to the copy."""
TIMEOUT_S = 600
"""For the tests of one mutant, which take seconds on an idle machine."""
_PASSED, _FAILED = 0, 1
"""pytest's exit codes; with all others it has not run the tests to their end."""


@dataclass(frozen=True)
class Mutant:
    """A small defect, put into the product to see whether a test fails."""

    name: str
    """Kebab-case, unique."""
    file: str
    """Path relative to the checkout."""
    old: str
    """Text that is in the file exactly once."""
    new: str
    """What replaces it."""
    tests: tuple[str, ...]
    """Names of test functions, of which at least one must fail."""


class Verdict(StrEnum):
    """The outcome of a mutant."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    UNREACHED = "UNREACHED"
    """No test runs the line of a sample's change."""
    EQUIVALENT = "equivalent"
    """A list says why no test can notice it."""
    DRIFTED = "DRIFTED"
    """The old text is not in the file exactly once: the entry has to follow the code."""
    BROKEN = "BROKEN"
    """pytest did not run the tests to their end: nothing is known about the mutant."""


class DriftError(ValueError):
    """A mutant's old text is not in its file exactly once."""


def read_catalog() -> tuple[Mutant, ...]:
    """All mutants, in the catalog's order."""
    return tuple(
        Mutant(name, file, old, new, tuple(tests))
        for file, entries in tomllib.loads(CATALOG.read_text()).items()
        for name, (old, new, *tests) in entries.items()
    )


def copy_sources(checkout: Path, copy: Path) -> None:
    """Copy the checkout without what is built, so also without a mutant's bytecode."""
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)


def node_ids(checkout: Path, functions: Iterable[str]) -> tuple[str, ...]:
    """The pytest node IDs of test functions. Raises DriftError if one is missing."""
    found: dict[str, list[str]] = {}
    for path in sorted((checkout / "tests").rglob("test_*.py")):
        for function in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE):
            found.setdefault(function, []).append(f"{path.relative_to(checkout)}::{function}")
    if missing := [function for function in functions if function not in found]:
        raise DriftError(f"no test is named {', '.join(missing)}: update the entry in tests/mutants/catalog.toml")
    return tuple(dict.fromkeys(test for function in functions for test in found[function]))


def mutated(mutant: Mutant, text: str) -> str:
    """The text of the mutant's file with the defect. Raises DriftError."""
    found = text.count(mutant.old)
    if found != 1:
        raise DriftError(
            f"{mutant.name}: {mutant.file} has {found} occurrences of {mutant.old!r}, not one: the code has changed; "
            "update the entry in tests/mutants/catalog.toml"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(
    copy: Path, tests: Sequence[str], log: Path, *, seconds: float | None = None, coverage: Path | None = None
) -> int | None:
    """Return pytest's exit code for these tests of the copy, or None on a timeout."""
    # Bytecode is trusted by its source's size and time in seconds, and a mutant may have both of its original.
    changes = {"PYTHONPATH": os.pathsep.join(str(copy / folder) for folder in PACKAGES), "PYTHONDONTWRITEBYTECODE": "1"}
    measured = ["coverage", "run", f"--rcfile={coverage}", "-m"] if coverage else []
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", "not slow"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *measured, "pytest", *options, *tests],
            cwd=copy,
            env={**os.environ, **changes},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # With the processes that the tests have started.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


@contextmanager
def with_text(path: Path, text: str) -> Iterator[None]:
    """Give a file another text for a while."""
    original = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(original)


def try_mutant(mutant: Mutant, copy: Path, log: Path) -> tuple[Verdict, str]:
    """Try the mutant, restore the copy, return the verdict and a survivor's output."""
    path = copy / mutant.file
    try:
        tests = node_ids(copy, mutant.tests)
        defect = mutated(mutant, path.read_text() if path.is_file() else "")
    except DriftError as error:
        return Verdict.DRIFTED, str(error)
    with with_text(path, defect):
        code = run_tests(copy, tests, log, seconds=TIMEOUT_S)
    return verdict_of(code), "" if code == _FAILED else f"{' '.join(tests)}: {tail(log)}"


def verdict_of(code: int | None) -> Verdict:
    """The verdict of pytest's exit code on a mutant; None if it took too long."""
    return {_FAILED: Verdict.CAUGHT, _PASSED: Verdict.SURVIVED}.get(code if code is not None else -1, Verdict.BROKEN)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
