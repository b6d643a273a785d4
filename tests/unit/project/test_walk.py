"""The walk's runner with harmless commands, its page, and its commands against the program that they call."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from docs.screenshots import colored_page
from examples.walk.runner import Recorded, Shell, WalkError, page, run
from examples.walk.steps import INTRODUCTION, TERMINALS, WALK, Step
from examples.walk.terminal import screen_after
from qlora_cli.__main__ import main

ROOT = Path(__file__).parents[3]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "walk.md"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path, tmp_path / "config", [], seconds=20)


def quiet(_text: str) -> None:
    """Shows nothing."""


def test_each_command_runs_in_the_shell_and_is_shown_with_its_output(shell: Shell) -> None:
    shown: list[str] = []
    steps = [
        Step("First", "echo $KUBECONFIG > file\ncat file", shows=("config",)),
        Step("First", "echo one \\\n  two >&2; exit 15", shows=("one two",), exit_code=15),
    ]
    first, second = run(steps, shell, shown.append)
    assert first.outputs == [("echo $KUBECONFIG > file", ""), ("cat file", f"{shell.kubeconfig}\n")]
    assert second.outputs == [("echo one \\\n  two >&2; exit 15", "one two\n")]
    assert "".join(shown).startswith(f"$ echo $KUBECONFIG > file\n$ cat file\n{shell.kubeconfig}\n$ echo one")


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Step("", "echo why; false"), "ended with 1, must end with 0\nwhy"),
        (Step("", "true", exit_code=15), "ended with 0, must end with 15"),
        (Step("", "false\ntrue"), "false: ended with 1"),
        (Step("", "false | cat"), "ended with 1"),
        (Step("", "echo this", shows=("that",)), "must print 'that', has printed\nthis"),
    ],
)
def test_the_walk_stops_where_something_else_happens(step: Step, why: str, shell: Shell) -> None:
    with pytest.raises(WalkError, match=re.escape(why)):
        list(run([step, Step("", "touch later")], shell, quiet))
    assert not (shell.folder / "later").exists()


def test_a_command_that_hangs_ends_the_walk(tmp_path: Path) -> None:
    with pytest.raises(WalkError, match="sleep 60: ended with 124"):
        list(run([Step("", "sleep 60")], Shell(tmp_path, tmp_path / "config", [], seconds=0.2), quiet))


def test_the_page_has_each_output_as_it_came() -> None:
    step = Step("Train", "first\nsecond", tells="Why.")
    assert page("Walk", "Recorded.", [Recorded(step, [("first", "no newline"), ("second", "```\n  two  \n\n")])]) == (
        "# Walk\n\nRecorded.\n\n## Train\n\nWhy.\n\n````console\n$ first\nno newline\n$ second\n```\n  two\n\n````\n"
    )


def commands() -> list[str]:
    return [command for step in WALK for command in step.with_values({"steps": "8"}).commands]


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
def test_the_program_takes_each_command_of_the_walk_and_of_the_readme(
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


def test_the_recorded_page_has_each_command_and_what_is_said_of_it() -> None:
    recorded = PAGE.read_text()
    [number] = set(re.findall(r"--max-steps (\d+)", recorded))
    steps = [step.with_values({"steps": number}) for step in WALK]
    said = [INTRODUCTION, *(f"## {step.chapter}\n" for step in steps), *(step.tells for step in steps)]
    assert [text for text in said if text not in recorded] == []
    typed = [f"$ {command}\n" for step in steps for command in step.commands]
    assert [command for command in typed if command not in recorded] == []


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_picture_shows_what_is_left_on_the_terminal_in_its_colors(shell: Shell) -> None:
    screen = screen_after(r"printf 'gone\r\033[K\033[31mred\033[0m <b>\n'", shell)
    assert "gone" not in screen
    shown = colored_page("printf …", screen)
    assert "<b>$</b> printf …" in shown
    assert re.search(r'<span style="color: #bf616a[^"]*">red</span> *(<[^>]*>)* *&lt;b&gt;', shown), shown
