"""Runs the commands of a walk in a real shell, and writes their output as a page."""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.walk.steps import Step


class WalkError(Exception):
    """A command did not do what the walk expects, as its output in the message shows."""


@dataclass(frozen=True)
class Shell:
    """Environment of commands: a folder, a kubeconfig, and folders of programs."""

    folder: Path
    kubeconfig: Path
    programs: Sequence[Path]
    """Folders that are searched before those of PATH."""
    seconds: float = 900
    """A command that takes longer fails."""

    def environment(self) -> dict[str, str]:
        """Return the caller's environment without variables of its terminal."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        path = os.pathsep.join([*map(str, self.programs), os.environ["PATH"]])
        own = {"KUBECONFIG": str(self.kubeconfig), "PATH": path, "LANG": "C.UTF-8", "TZ": "UTC"}
        return {**inherited, **own, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Recorded:
    """A step and its commands' output, with standard error, in order of arrival."""

    step: Step
    outputs: Sequence[tuple[str, str]]


def run(steps: Iterable[Step], shell: Shell, show: Callable[[str], None]) -> Iterator[Recorded]:
    """Run the commands one after the other; show each, and its output while it runs.

    Raises WalkError at the first that ends with another code than its step names, takes too long, or does not print
    its step's text.
    """
    for step in steps:
        outputs = []
        for number, command in enumerate(step.commands, 1):
            show(f"$ {command}\n")
            code, output = _run_one(command, shell, show)
            wanted = step.exit_code if number == len(step.commands) else 0
            if code != wanted:
                raise WalkError(f"{command}: ended with {code}, must end with {wanted}\n{output}")
            outputs.append((command, output))
        printed = "".join(output for _, output in outputs)
        if missing := [text for text in step.shows if text not in printed]:
            raise WalkError(f"{step.script}: must print {' and '.join(map(repr, missing))}, has printed\n{printed}")
        yield Recorded(step, outputs)


def _run_one(command: str, shell: Shell, show: Callable[[str], None]) -> tuple[int, str]:
    """Return exit code and output of the command, 124 if it exceeds `timeout`."""
    process = subprocess.Popen(
        ["timeout", str(shell.seconds), "bash", "-u", "-o", "pipefail", "-c", command],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            show(line)
        return process.wait(), "".join(lines)
    finally:
        # Also when the caller was interrupted: no process of a walk outlives it.
        if process.poll() is None:
            process.terminate()
            process.wait()


def page(title: str, introduction: str, recorded: Iterable[Recorded]) -> str:
    """Return the walk in Markdown: each step's purpose, commands and output."""
    parts = [f"# {title}\n", f"{introduction}\n"]
    chapter = ""
    for each in recorded:
        if each.step.chapter != chapter:
            chapter = each.step.chapter
            parts.append(f"## {chapter}\n")
        if each.step.tells:
            parts.append(f"{each.step.tells}\n")
        text = "".join(f"$ {command}\n{_whole_lines(output)}" for command, output in each.outputs)
        fence = "`" * max(3, _longest_fence(text) + 1)
        parts.append(f"{fence}console\n{text}{fence}\n")
    return "\n".join(parts)


def _whole_lines(output: str) -> str:
    """Without the blanks that tables have at the ends of lines."""
    return "".join(f"{line.rstrip()}\n" for line in output.splitlines())


def _longest_fence(text: str) -> int:
    """The most backquotes at the beginning of a line."""
    return max((len(line) - len(line.lstrip("`")) for line in text.splitlines()), default=0)
