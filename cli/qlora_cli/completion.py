"""Completes commands, options and names of jobs: in a shell, for `qlora`, and by kubectl, for `kubectl qlora`."""

import sys
from typing import Literal, get_args

import click
from click.shell_completion import ShellComplete, get_completion_class

from qlora_cli.__main__ import main

Shell = Literal["bash", "zsh", "fish"]
_PROGRAM, _VARIABLE = "qlora", "_QLORA_COMPLETE"
# Directives of Cobra, which kubectl reads from the last line of a completion program's output.
_FILES_TOO, _NOTHING_ELSE = ":0", ":4"


@click.command()
@click.argument("shell", type=click.Choice(get_args(Shell)))
def completion(shell: Shell) -> None:
    """Print a script for shell completion of commands, options and names of jobs.

    For bash, add `eval "$(qlora completion bash)"` to ~/.bashrc. kubectl completes `kubectl qlora` without it.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"{shell} cannot complete")
    click.echo(kind(main, {}, _PROGRAM, _VARIABLE).source(), nl=False)


def complete_for_kubectl() -> None:
    """Print the completions of this program's last argument, in the format of kubectl."""
    *before, incomplete = sys.argv[1:] or [""]
    found = ShellComplete(main, {}, _PROGRAM, _VARIABLE).get_completions(before, incomplete)
    plain = [item for item in found if item.type == "plain"]
    for item in plain:
        click.echo(f"{item.value}\t{item.help}" if item.help else item.value)
    click.echo(_NOTHING_ELSE if len(plain) == len(found) else _FILES_TOO)


if __name__ == "__main__":
    complete_for_kubectl()
