"""The user's command line: what a job needs (`qlora plan`) and sees (`qlora data`), and the job here (`qlora run`)."""

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import NoReturn, get_args

import click
from rich.console import Console
from rich.table import Table

from qlora_api.contract import ExitCode
from qlora_api.v1alpha1 import QLoRAJobDocument, QLoRAJobSpec
from qlora_cli.display import ConsoleDisplay
from qlora_cli.manifest import ManifestError, load_manifest
from qlora_cli.plan import find_config, make_plan, show_plan
from qlora_cli.rows import RowAccess, show_lengths, show_rows
from qlora_cli.run import Ended, LocalRun, has_gpu, missing_data, missing_sources, run_steps
from qlora_trainer.core.context import Device, Mounts
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import steps_done


def _fail(message: str, exit_code: int = ExitCode.BAD_CONFIGURATION) -> NoReturn:
    """Print the message to standard error, and exit with the code that the job's step would end with."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)


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


_file = click.argument("file", type=click.Path(path_type=Path))
_volume = click.option(
    "--volume",
    "claims",
    multiple=True,
    metavar="CLAIM=DIR",
    callback=_folders,
    help="Folder to use for pvc://CLAIM/….",
)


_config_map = click.option(
    "--config-map",
    "config_maps",
    multiple=True,
    metavar="NAME=DIR",
    callback=_folders,
    help="Folder to use for configMap://NAME/….",
)
_tokenizer = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Folder of the model's tokenizer.",
)


def _load(file: Path) -> QLoRAJobDocument:
    try:
        return load_manifest(file)
    except ManifestError as error:
        _fail(str(error))


@click.group(context_settings={"max_content_width": 120})
@click.version_option(package_name="qlora-operator")
def main() -> None:
    """Work with a QLoRAJob manifest without a cluster."""


@main.command()
@_file
@_volume
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The model's config.json.")
@click.option(
    "--gpu-memory", type=click.IntRange(1, 1024), help="GPU memory in GiB, instead of spec.resources.gpuMemory."
)
@click.option(
    "--data", is_flag=True, help="Also show how long the rows are, and how many maxSequenceLength leaves out."
)
@_config_map
@_tokenizer
def plan(
    file: Path,
    claims: dict[str, Path],
    config: Path | None,
    gpu_memory: int | None,
    data: bool,
    config_maps: dict[str, Path],
    tokenizer: Path | None,
) -> None:
    """Show the GPU memory that the job in FILE needs, and what to change if it does not fit.

    Exits with 17 if it cannot fit, as the job itself does.
    """
    document = _load(file)
    access = _row_access(document.spec, claims, config_maps, tokenizer) if data else None
    try:
        config = config or find_config(document.spec.model, Mounts(claims=claims))
        made = make_plan(document.metadata.name, document.spec, config, gpu_memory)
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)
    console = Console()
    show_plan(made, console)
    if access is not None:
        try:
            show_lengths(document.spec, access, console)
        except StepFailure as failure:
            _fail(failure.message, failure.exit_code)
    sys.exit(made.exit_code)


@main.command()
@_file
@click.option("--rows", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rows to show.")
@_volume
@_config_map
@_tokenizer
def data(file: Path, rows: int, claims: dict[str, Path], config_maps: dict[str, Path], tokenizer: Path | None) -> None:
    """Show the first rows of the job in FILE as the model sees them, and which tokens are trained on.

    These are green on a terminal, and between [[ and ]] elsewhere or with NO_COLOR set.
    """
    access = _row_access(_load(file).spec, claims, config_maps, tokenizer)
    try:
        with access.previews(rows) as previews:
            for preview in previews:
                show_rows(preview, Console())
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)


def _row_access(
    spec: QLoRAJobSpec, claims: dict[str, Path], config_maps: dict[str, Path], tokenizer: Path | None
) -> RowAccess:
    """Access to the job's rows; exits with what is missing."""
    missing = missing_data(spec, claims, config_maps)
    if missing:
        _fail("\n".join(missing))
    if importlib.util.find_spec("torch") is None:
        _fail("the trainer is not installed: install qlora-operator[cli,trainer]")
    return RowAccess(spec, Mounts(claims=claims, config_map_folders=config_maps), tokenizer)


@main.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; kept between runs.",
)
@click.option("--resume", is_flag=True, help="Resume the run in the workspace; fails if there is none.")
@_volume
@_config_map
@click.option(
    "--continues",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Workspace of the run that spec.continues names.",
)
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    help="Device to train on; by default cuda, if there is a driver.",
)
def run(
    file: Path | None,
    workspace: Path,
    resume: bool,
    claims: dict[str, Path],
    config_maps: dict[str, Path],
    continues: Path | None,
    device: Device | None,
) -> None:
    """Run the job in FILE on this machine: prepare, train, publish.

    Ctrl-C saves a checkpoint and stops. With --resume, FILE and the options default to those of the run in the
    workspace. The exit code is that of the step that failed.
    """
    earlier = _earlier_run(workspace) if resume else None
    if file is not None:
        document = _load(file)
    elif earlier is not None:
        document = earlier.document
    else:
        raise click.UsageError("Missing argument 'FILE': name the manifest, or resume an earlier run with --resume.")
    claims = {**(earlier.claims if earlier else {}), **claims}
    config_maps = {**(earlier.config_maps if earlier else {}), **config_maps}
    if (nodes := document.spec.resources.node_count) > 1:
        _fail(f"spec.resources.nodes is {nodes}, and this command runs a job on one machine: remove it from FILE")
    continues = continues or (earlier.continues if earlier else None)
    missing = missing_sources(document.spec, claims, config_maps, continues)
    if missing:
        _fail("\n".join(missing))
    if importlib.util.find_spec("torch") is None:
        _fail("the trainer is not installed: install qlora-operator[cli,trainer]")
    console = Console()
    device = device or (earlier.device if earlier else None)
    if device is None:
        device = "cuda" if has_gpu() else "cpu"
        console.print(f"Training on {device}; choose with --device.", highlight=False)
    local = LocalRun(document, workspace, claims, config_maps, device, continues)
    try:
        ended = run_steps(local, ConsoleDisplay(console, local.layout.records))
    except OSError as error:
        _fail(f"--workspace {workspace} cannot be written: {error.strerror}")
    _show_end(ended, local, console)
    sys.exit(ended.exit_code)


def _earlier_run(workspace: Path) -> LocalRun:
    try:
        return LocalRun.recall(workspace)
    except ValueError as error:
        _fail(str(error))


def _show_end(ended: Ended, local: LocalRun, console: Console) -> None:
    if ended.stopped_by is not None:
        command = shlex.join(["qlora", "run", "--resume", "--workspace", str(local.workspace)])
        console.print(f"To resume:\n  {command}", highlight=False, markup=False, soft_wrap=True)
        return
    if "publish" not in ended.results or ended.results["publish"].adapter is None:
        return
    adapter, merged = ended.results["publish"].adapter, ended.results["publish"].merged
    base, gate = ended.results["publish"].base, ended.results["publish"].gate
    trained = ended.results["train"]
    table = Table.grid(padding=(0, 2))
    table.add_row("Adapter", adapter.uri)
    table.add_row("SHA-256", adapter.sha256)
    table.add_row("Optimizer steps", steps_done(trained.training_step or 0, trained.total_steps, adapter.step))
    table.add_row("Training loss", _number(trained.loss))
    if trained.eval_loss is not None:
        table.add_row(
            "Held-out loss", f"{_number(trained.initial_eval_loss)} before, {_number(trained.eval_loss)} after"
        )
    if gate is not None and gate.score is not None:
        others = f"{gate.base_score or 0:.1%} without the adapter, {gate.score_rows} held-out rows"
        table.add_row("Answers that passed", f"{gate.score:.1%} ({others})")
    if base is not None and base.uri is not None:
        table.add_row("Base in 4-bit", base.uri)
    if merged is not None:
        table.add_row("Merged model", merged.uri)
    if merged is not None and merged.eval_loss is not None:
        losses = f"{_number(merged.eval_loss)} merged, {_number(merged.adapter_eval_loss)} with the adapter"
        table.add_row(f"Loss on {merged.eval_tokens} tokens", losses)
    table.add_row("Report", str(local.layout.report / "report.html"))
    console.print(table, soft_wrap=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
