"""Reads the catalog, applies a mutant to a copy of the sources and reports whether the tests notice."""

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

CATALOG = Path(__file__).with_name("catalog.toml")
SOURCES = (
    *("benchmarks", "cli", "crds", "devcluster", "docs", "examples", "helm", "operator", "tests", "trainer_image"),
    "pyproject.toml",
)
"""Files and folders of the checkout that the tests of a mutant read."""
PACKAGES = ("crds", "cli", "operator", "trainer_image", ".")
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
    """pytest node IDs, `path::function`, of which at least one must fail."""


class Verdict(StrEnum):
    """The outcome of a mutant."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    DRIFTED = "DRIFTED"
    """The old text is not in the file exactly once: the entry has to follow the code."""
    BROKEN = "BROKEN"
    """pytest did not run the tests to their end: nothing is known about the mutant."""


class DriftError(ValueError):
    """A mutant's old text is not in its file exactly once."""


def read_catalog() -> tuple[Mutant, ...]:
    """All mutants, in the catalog's order."""
    return tuple(
        Mutant(name, file, entry["old"], entry["new"], tuple(entry["tests"]))
        for file, entries in tomllib.loads(CATALOG.read_text()).items()
        for name, entry in entries.items()
    )


def copy_sources(checkout: Path, copy: Path) -> None:
    """Copy the tests' files into the empty folder `copy`, without a mutant's bytecode."""
    for name in SOURCES:
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
        elif (checkout / name).exists():
            shutil.copy2(checkout / name, copy / name)


def mutated(mutant: Mutant, text: str) -> str:
    """The text of the mutant's file with the defect. Raises DriftError."""
    found = text.count(mutant.old)
    if found != 1:
        raise DriftError(
            f"{mutant.name}: {mutant.file} has {found} occurrences of {mutant.old!r}, not one: the code has changed; "
            "update the entry in tests/mutants/catalog.toml"
        )
    return text.replace(mutant.old, mutant.new)


def run_tests(copy: Path, tests: tuple[str, ...], log: Path, *, seconds: float | None = None) -> int | None:
    """Return pytest's exit code for these tests of the copy, or None on a timeout."""
    # Bytecode is trusted by its source's size and time in seconds, and a mutant may have both of its original.
    changes = {"PYTHONPATH": os.pathsep.join(str(copy / folder) for folder in PACKAGES), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    with log.open("w") as output:
        try:
            return subprocess.run(
                command,
                cwd=copy,
                env={**os.environ, **changes},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def try_mutant(mutant: Mutant, copy: Path, log: Path) -> tuple[Verdict, str]:
    """Try the mutant, restore the copy, return the verdict and a survivor's output."""
    path = copy / mutant.file
    original = path.read_text() if path.is_file() else ""
    try:
        defect = mutated(mutant, original)
    except DriftError as error:
        return Verdict.DRIFTED, str(error)
    path.write_text(defect)
    try:
        code = run_tests(copy, mutant.tests, log, seconds=TIMEOUT_S)
    finally:
        path.write_text(original)
    return verdict_of(code), "" if code == _FAILED else f"{' '.join(mutant.tests)}: {tail(log)}"


def verdict_of(code: int | None) -> Verdict:
    """The verdict of pytest's exit code on a mutant; None if it took too long."""
    return {_FAILED: Verdict.CAUGHT, _PASSED: Verdict.SURVIVED}.get(code if code is not None else -1, Verdict.BROKEN)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
