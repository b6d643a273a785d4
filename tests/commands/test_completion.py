"""Completions for shells and kubectl."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from qlora_cli.__main__ import main


def completed(*words: str) -> list[str]:
    """The lines for kubectl."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_cli.completion", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KUBECONFIG": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()


def test_kubectl_completes_commands_with_descriptions_and_no_files() -> None:
    lines = completed("su")
    assert [line.split("\t")[0] for line in lines] == ["submit", "suspend", ":4"]
    assert lines[0].split("\t")[1].startswith("Create a job")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("logs", "job", "--step", ""), ["prepare", "train", "publish", "clean", ":4"]),
        (("list", "--output", "j"), ["json", ":4"]),
        (("logs", ""), [":4"]),
        # A manifest is a file, and so is a kubeconfig.
        (("submit", ""), [":0"]),
    ],
)
def test_kubectl_completes_values_and_files(words: tuple[str, ...], lines: list[str]) -> None:
    assert completed(*words) == lines


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_calls_this_program(shell: str) -> None:
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    assert f"_QLORA_COMPLETE={shell}_complete" in script
