"""`make test` with programs that only note how they were called: in which order, and how it ends."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
PREPARE = "-m devcluster prepare"
SUITES = ["tests/devcluster tests/trainer", "tests/gpu", "tests/api", "tests/cluster"]
# `behavior` has a case for each call that does more than being noted.
PROGRAM = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
{behavior}
esac
"""


class Checkout:
    """A folder in which `make` finds everything installed, and programs in place of Python and the linters."""

    def __init__(self, folder: Path, behavior: str) -> None:
        self.calls = folder / "calls"
        self._folder, self._cache = folder, folder / "cache"
        version = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("UV_VERSION"))
        uv = self._cache / f"uv-{version.split()[-1]}" / "bin" / "uv"
        for file in (folder / "pyproject.toml", folder / "uv.lock", folder / ".venv" / ".synced"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        names = ("python", "ruff", "mypy", "lint-imports", "deptry")
        programs = [folder / ".venv" / "bin" / name for name in names]
        for program in (*programs, uv):
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(PROGRAM.format(behavior=behavior))
            program.chmod(0o755)

    def make(self, *target: str) -> "subprocess.CompletedProcess[str]":
        """Run `make` to its end, in a session of its own, so that a signal to its group reaches nothing else."""
        environment = {**os.environ, "QLORA_CACHE": str(self._cache), "CALLS": str(self.calls)}
        for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
            environment.pop(name, None)
        return subprocess.run(
            ["make", "--file", str(ROOT / "Makefile"), *(target or ("test",))],
            cwd=self._folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,
            # Whoever runs the tests in the background has it ignored, which a shell cannot undo.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def suites(self) -> list[str]:
        """The folders of the suites that ran, in order."""
        calls = self.calls.read_text().splitlines()
        return [call[call.index("tests/") :] for call in calls if "pytest -rfEs" in call]


def test_it_runs_each_suite_and_leaves_slow_proofs_out(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "")
    done = checkout.make()
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkout.suites() == SUITES
    calls = checkout.calls.read_text()
    assert calls.count("-m not slow tests/") == len(SUITES)
    assert f"{PREPARE}\n" in calls


def test_only_all_tests_build_what_only_slow_ones_need(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "")
    done = checkout.make("test-all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{PREPARE} --slow\n" in checkout.calls.read_text()


@pytest.mark.parametrize("suite", SUITES)
def test_it_fails_if_one_suite_does_and_runs_the_others(tmp_path: Path, suite: str) -> None:
    checkout = Checkout(tmp_path, f'  *"{suite}") exit 1;;')
    assert checkout.make().returncode != 0
    assert checkout.suites() == SUITES


@pytest.mark.parametrize("check", ["format --check", "tests/unit"])
def test_it_ends_with_a_check_that_fails(tmp_path: Path, check: str) -> None:
    checkout = Checkout(tmp_path, f'  *"{check}") exit 1;;')
    assert checkout.make().returncode != 0
    assert checkout.suites() == []


def test_it_shows_why_programs_or_images_could_not_be_built(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, f'  "{PREPARE}") echo no space left on device; exit 1;;')
    done = checkout.make()
    assert done.returncode != 0
    assert "no space left on device" in done.stdout
    assert checkout.suites() == SUITES[:2]


def test_ctrl_c_ends_it_and_what_is_built_beside_it(tmp_path: Path) -> None:
    """The suite that is interrupted ends by itself, with pytest's exit code."""
    build = "trap 'kill $!; rm building; exit' TERM; sleep 1000 & touch building; wait"
    suite = "until [ -e building ]; do sleep 0.01; done; trap 'exit 2' INT; kill -INT 0"
    checkout = Checkout(tmp_path, f'  "{PREPARE}") {build};;\n  *"{SUITES[0]}") {suite};;')
    assert checkout.make().returncode != 0
    assert checkout.suites() == SUITES[:1]
    eventually(lambda: not (tmp_path / "building").exists(), seconds=10, every=0.01, what="the end of the build")
