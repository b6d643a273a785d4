"""The trainer's command line: a command for each step, and one to check a machine."""

import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import get_args

import click

from qlora_api import contract
from qlora_api.status import StepName
from qlora_trainer.core import process
from qlora_trainer.core.compile_later import load_bitsandbytes
from qlora_trainer.core.context import Device, Mounts, TaskFolder
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.runner import Invocation, run


def _folders(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Folders by name, from the values of an option that may be given several times."""
    folders = {}
    for value in values:
        name, _, folder = value.partition("=")
        if not (name and folder):
            raise click.BadParameter(f"found {value!r}, must be {parameter.metavar}")
        folders[name] = Path(folder).absolute()
    return folders


_EXISTING_LOG = contract.TERMINATION_LOG if Path(contract.TERMINATION_LOG).exists() else None
_PATH = click.Path(path_type=Path)
_DEVICES = click.Choice(get_args(Device))
_pod_option = partial(click.option, show_envvar=True)

_OPTIONS = (
    click.option("--job", type=_PATH, default=Path(contract.JOB_FILE), help="The QLoRAJob, JSON."),
    click.option("--workspace", type=_PATH, default=Path(contract.WORKSPACE_MOUNT), help="The job's own folder."),
    click.option("--volume", multiple=True, metavar="CLAIM=DIR", callback=_folders, help="Folder of a claim."),
    click.option("--config-map", multiple=True, metavar="NAME=DIR", callback=_folders, help="Folder of a ConfigMap."),
    click.option(
        "--continues",
        type=_PATH,
        default=Path(contract.CONTINUED_MOUNT),
        help="Workspace folder of the job that spec.continues names.",
    ),
    _pod_option("--model-cache", type=_PATH, envvar=contract.ENV_MODEL_CACHE, help="Folder for shared base models."),
    _pod_option(
        "--sweep-folder",
        type=_PATH,
        envvar=contract.ENV_SWEEP_FOLDER,
        help="Folder that the cells of a sweep share.",
    ),
    _pod_option(
        "--benchmarks",
        type=_PATH,
        envvar=contract.ENV_BENCHMARKS,
        help="Folder of the tasks of spec.gate.benchmarks.",
    ),
    _pod_option(
        "--benchmarks-sha256", default="", envvar=contract.ENV_BENCHMARKS_SHA256, help="SHA-256 of that folder."
    ),
    click.option(
        "--termination-log", type=_PATH, default=_EXISTING_LOG, help="File for another copy of the result record."
    ),
    _pod_option("--device", type=_DEVICES, default="cuda", envvar=contract.ENV_DEVICE, help="Where training runs."),
    _pod_option("--pod-uid", default="local", envvar=contract.ENV_POD_UID),
    _pod_option("--attempt", type=click.IntRange(min=1), default=1, envvar=contract.ENV_ATTEMPT),
    _pod_option(
        "--claim", default="", envvar=contract.ENV_OUTPUT_CLAIM, help="Name of the claim that the workspace is on."
    ),
)


@click.group(context_settings={"show_default": True, "max_content_width": 120})
def main() -> None:
    """Fine-tune a language model with QLoRA, one step at a time.

    A step's standard output carries records only.
    """


_WITH = click.option(
    "--with",
    "others",
    multiple=True,
    type=(_PATH, _PATH),
    metavar="JOB DIR",
    help="Document and workspace of another job, which is trained together with this one, on the same base.",
)


def _add_step(step: StepName, help_text: str) -> None:
    def command(
        volume: dict[str, Path],
        config_map: dict[str, Path],
        continues: Path,
        model_cache: Path | None,
        sweep_folder: Path | None,
        benchmarks: Path | None,
        benchmarks_sha256: str,
        others: tuple[tuple[Path, Path], ...] = (),
        **options: object,
    ) -> None:
        mounts = Mounts(
            claims=volume,
            config_map_folders=config_map,
            continued=continues.absolute(),
            model_cache=model_cache and model_cache.absolute(),
            sweep=sweep_folder,
            tasks=None if benchmarks is None else TaskFolder(benchmarks.absolute(), benchmarks_sha256),
        )
        run(Invocation(step=step, mounts=mounts, others=others, **options))  # type: ignore[arg-type]

    for option in reversed((*_OPTIONS, _WITH) if step == "train" else _OPTIONS):
        command = option(command)
    main.command(step, help=help_text)(command)


_add_step("prepare", "Check the model and the data, and write both into the workspace.")
_add_step("train", "Train the adapter, from the newest checkpoint if there is one.")
_add_step("publish", "Verify the adapter, write its report, and publish it to its destination.")
_add_step("clean", "Delete what only the steps needed; the adapter, the report and the records stay.")


@main.command()
@click.option("--device", type=_DEVICES, default="cuda", help="Where training runs.")
def selftest(device: Device) -> None:
    """Train a step of tiny models, and compare it with a CPU in float32: for new nodes, drivers and images."""
    process.set_environment("train", Path.cwd(), device=device)
    # Libraries warn of what concerns their users, not the machine.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    load_bitsandbytes()
    # It loads PyTorch.
    from qlora_trainer.steps.selftest import checks

    passed = True
    try:
        for check in checks(device):
            click.echo(check)
            passed &= check.passed
    except StepFailure as failure:
        raise click.ClickException(failure.message) from failure
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
