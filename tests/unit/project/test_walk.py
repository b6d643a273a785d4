"""The program takes the commands that the walk and README show, and the walk's page has them all."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from examples.walk.steps import INTRODUCTION, TERMINALS, WALK
from qlora_cli.__main__ import main

ROOT = Path(__file__).parents[3]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "walk.md"


def commands() -> list[str]:
    found = [command for step in WALK for command in step.with_values({"steps": "8"}).commands]
    assert found
    return found


def readme_commands() -> list[str]:
    """The commands of README for a cluster, without their comments."""
    section = README.read_text().partition("## On your cluster\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^(?:kubectl qlora|qlora|helm) .*$", section, re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


@pytest.mark.parametrize(
    "command",
    [
        command
        for command in (*commands(), *TERMINALS.values(), *readme_commands())
        if command.startswith(("qlora ", "kubectl qlora "))
    ],
)
def test_the_program_accepts_each_command_of_the_walk_and_the_readme(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signing.pub").touch()
    words = shlex.split(command.removeprefix("kubectl ").removeprefix("qlora ").replace("\\\n", " "))
    assert isinstance(main, click.Group)
    found = main.get_command(click.Context(main), words[0])
    assert found is not None
    found.make_context(words[0], words[1:])


def test_every_command_that_the_readme_shows_for_a_cluster_is_walked() -> None:
    verbs = [re.findall(r"^(?:kubectl qlora|qlora|helm) \w+", command)[0] for command in readme_commands()]
    assert {"kubectl qlora doctor", "kubectl qlora submit"} <= set(verbs)
    assert [verb for verb in verbs if not any(command.startswith(verb) for command in commands())] == []


def test_the_walk_verifies_suspends_compares_and_uninstalls() -> None:
    verbs = [f"kubectl qlora {verb}" for verb in ("suspend", "resume", "report", "compare")]
    verbs += ["qlora verify", "helm uninstall"]
    assert [verb for verb in verbs if not any(command.startswith(verb) for command in commands())] == []


def test_the_shell_reads_the_walk_as_the_page_shows_it() -> None:
    for command in commands():
        subprocess.run(["bash", "-n", "-c", command], check=True, capture_output=True)
        assert "{steps}" not in command
        assert "{{" not in command


def test_the_recorded_page_has_each_command_and_its_description() -> None:
    recorded = PAGE.read_text()
    [number] = set(re.findall(r"--max-steps (\d+)", recorded))
    steps = [step.with_values({"steps": number}) for step in WALK]
    said = [INTRODUCTION, *(f"## {step.chapter}\n" for step in steps), *(step.tells for step in steps)]
    assert [text for text in said if text not in recorded] == []
    typed = [f"$ {command}\n" for step in steps for command in step.commands]
    assert [command for command in typed if command not in recorded] == []
