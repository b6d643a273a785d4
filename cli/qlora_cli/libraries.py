"""What to install for a command whose libraries are missing: each extra of the project has those of some commands."""

from typing import NoReturn

import click

_EXTRAS = {"verify": "cli,stores", "plan": "cli,trainer", "data": "cli,trainer", "run": "cli,trainer"}
_ASKS_A_CLUSTER = "cli,client"


def say_what_to_install(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Raise a ClickException with the extra that has the library. Raises the error itself for a module of our own."""
    if error.name is None or error.name.startswith("qlora_"):
        raise error
    install = f"run `pip install '.[{_EXTRAS.get(command, _ASKS_A_CLUSTER)}]'` in a checkout of the repository"
    library = error.name.partition(".")[0]
    raise click.ClickException(f"`{command}` takes the library {library}, which is not installed: {install}") from None
