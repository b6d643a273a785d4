"""Options of several commands that need no cluster."""

from pathlib import Path

import click


def _folders(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    folders = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not (name and folder):
            raise click.BadParameter(f"found {value!r}, must be {parameter.metavar}")
        if not Path(folder).is_dir():
            raise click.BadParameter(f"found {value!r}, and {folder} is not a folder: create it, or name another")
        folders[name] = Path(folder)
    return folders


given = click.argument("file")
model = click.option("--model", metavar="MODEL", help="Address or folder of the model, for rows without a manifest.")
volume = click.option(
    "--volume",
    "claims",
    multiple=True,
    metavar="CLAIM=DIR",
    callback=_folders,
    help="Folder to use for pvc://CLAIM/….",
)


config_map = click.option(
    "--config-map",
    "config_maps",
    multiple=True,
    metavar="NAME=DIR",
    callback=_folders,
    help="Folder to use for configMap://NAME/….",
)
tokenizer = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the model's tokenizer.",
)
