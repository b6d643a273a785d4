"""The commands that need no cluster: `plan` (memory), `data` (rows) and `run` (the job)."""

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, get_args

import click
from rich.console import Console
from rich.progress import Progress

from qlora_api.contract import ExitCode
from qlora_api.gpus import GPUS
from qlora_api.spec.job import ObjectMeta, QLoRAJobDocument
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.local import shared_options
from qlora_cli.local.display import ConsoleDisplay, RecordDisplay, progress_bar
from qlora_cli.local.forecast import GpuOfPlan, gpu_of_plan, gpu_of_profile, parse_gpu_memory, parse_price
from qlora_cli.local.given import Given
from qlora_cli.local.plan import find_config, show_remark
from qlora_cli.local.quiet import quiet_libraries
from qlora_cli.local.restart import discard_runs
from qlora_cli.local.results import show_end, show_ends
from qlora_cli.local.rows import RowAccess, show_first_rows
from qlora_cli.local.run import Display, LocalRun, has_gpu, missing_data, missing_sources, run_steps
from qlora_cli.local.run_sweep import LocalSweep, earlier_sweep, run_sweep
from qlora_cli.local.whole_plan import show_whole_plan
from qlora_cli.manifest import Document, ManifestError, load_manifest
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.source.hub_config import INSTALL, FoundConfig


def _fail(message: str, exit_code: int = ExitCode.BAD_CONFIGURATION) -> NoReturn:
    """Print the message to standard error, and exit with the code of the job's step."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)


def _load(file: Path) -> Document:
    try:
        return load_manifest(file)
    except ManifestError as error:
        _fail(str(error))


def _load_given(file: str, model: str | None, claims: dict[str, Path], config_maps: dict[str, Path]) -> Given:
    try:
        return Given.load(file, model, claims, config_maps)
    except ManifestError as error:
        _fail(str(error))


@click.command()
@shared_options.given
@shared_options.model
@shared_options.volume
@click.option("--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The model's config.json.")
@click.option(
    "--gpu-memory",
    callback=parse_gpu_memory,
    metavar="MEMORY",
    help="Memory of each GPU, for example 24Gi, instead of spec.resources.gpuMemory.",
)
@click.option(
    "--gpu",
    "gpu_name",
    type=click.Choice(list(GPUS)),
    help="GPU to plan for: its memory and speed, instead of spec.resources.gpuMemory and --gpu-tflops.",
)
@click.option(
    "--data",
    is_flag=True,
    help="Also count the steps and tokens of the job, and show how long the rows are, how many maxSequenceLength "
    "leaves out, which are equal, and what a mix gives to an epoch.",
)
@click.option(
    "--gpu-tflops",
    type=click.FloatRange(0, 1e6, min_open=True),
    help="Speed of the GPU in dense bfloat16, for a forecast of GPU hours; the profile's gpuTflops.",
)
@click.option(
    "--gpu-hour-price", metavar="PRICE", callback=parse_price, help="Price of a GPU hour, for example '2.50 EUR'."
)
@click.option(
    "--profile",
    type=click.File(),
    callback=gpu_of_profile,
    metavar="FILE",
    help="QLoRAProfile with gpuMemory, gpuTflops and gpuHourPrice, instead of these options; - for that of "
    "`kubectl get qloraprofile NAME -o yaml`.",
)
@click.option("--tokens", type=click.IntRange(1, 10**15), help="Tokens of one epoch, for the forecast.")
@shared_options.config_map
@shared_options.tokenizer
def plan(
    file: str,
    model: str | None,
    claims: dict[str, Path],
    config: Path | None,
    gpu_memory: int | None,
    gpu_name: str | None,
    data: bool,
    gpu_tflops: float | None,
    gpu_hour_price: tuple[str, str] | None,
    profile: GpuOfPlan,
    tokens: int | None,
    config_maps: dict[str, Path],
    tokenizer: Path | None,
) -> None:
    """Show the GPU memory that the job in FILE needs, and what to change if it does not fit.

    FILE is a manifest, or rows: a file, a folder or an address.

    Of a QLoRASweep, show the cells and what each of its pods needs. Of a job, show the steps and, with --gpu,
    --gpu-tflops or --profile, the time that it is expected to take. Exits with 17 if it cannot fit, as the job itself
    does, and with 3 if it may run out of memory.
    """
    quiet_libraries()
    given, console = _load_given(file, model, claims, config_maps), Console(emoji=False)
    if not given.has_model and (config is None or (data and tokenizer is None)):
        _fail(f"{file} has rows, and a plan needs a model: give its address or folder with --model")
    access = _row_access(given, tokenizer) if data else None
    given = given.with_memory(profile.host_memory)
    try:
        memory = gpu_memory or (profile.gib if given.spec.resources.gpu_memory is None and gpu_name is None else None)
        gpu = gpu_of_plan(gpu_name, memory, gpu_tflops or profile.tflops, gpu_hour_price or profile.price)
        found = FoundConfig(config) if config is not None else find_config(given.spec.model, given.mounts)
        show_remark(found.remark, console)
        exit_code = show_whole_plan(given.document, found.path, gpu, access, tokens, console)
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)
    sys.exit(exit_code)


@click.command()
@shared_options.given
@shared_options.model
@click.option(
    "--rows",
    type=click.IntRange(0, 1000),
    default=3,
    show_default=True,
    help="Rows to read and show; 0 reads all, and shows 3.",
)
@shared_options.volume
@shared_options.config_map
@shared_options.tokenizer
def data(
    file: str,
    model: str | None,
    rows: int,
    claims: dict[str, Path],
    config_maps: dict[str, Path],
    tokenizer: Path | None,
) -> None:
    """Show the first rows of FILE as the model sees them, and which tokens are trained on.

    FILE is a manifest, or rows: a file, a folder or an address. Tokens that are trained on are green on a terminal, and
    between [[ and ]] elsewhere or with NO_COLOR set. Wrong rows are listed at the end, with totals by kind.
    """
    quiet_libraries()
    access = _row_access(_load_given(file, model, claims, config_maps), tokenizer)
    try:
        show_first_rows(access, rows, Console(emoji=False))
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)


def _row_access(given: Given, tokenizer: Path | None) -> RowAccess:
    """Access to the job's rows; exits with a message if something is missing."""
    missing = missing_data(given.spec, given.claims, given.config_maps)
    if missing:
        _fail("\n".join(missing))
    if importlib.util.find_spec("torch") is None:
        _fail(f"the trainer is not installed: {INSTALL}")
    return RowAccess(given.spec, given.mounts, tokenizer, given.has_model, given.is_manifest)


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the run; kept between runs. Each cell of a sweep has a folder by its name in it.",
)
@click.option("--resume", is_flag=True, help="Resume the run in the workspace; fails without one.")
@click.option(
    "--restart",
    is_flag=True,
    help="Discard the checkpoints, the adapter and the report of the run in the workspace, and start over.",
)
@shared_options.volume
@shared_options.config_map
@click.option(
    "--continues",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Workspace of the run that spec.continues names.",
)
@click.option(
    "--benchmarks",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of the tasks of spec.gate.benchmarks.",
)
@click.option(
    "--device",
    type=click.Choice(get_args(Device)),
    help="Device to train on; cuda by default, if a driver is installed.",
)
@click.option("-o", "--output", type=click.Choice(["json"]), help="Print the steps' records as lines of JSON.")
def run(
    file: Path | None,
    workspace: Path,
    resume: bool,
    restart: bool,
    claims: dict[str, Path],
    config_maps: dict[str, Path],
    continues: Path | None,
    benchmarks: Path | None,
    device: Device | None,
    output: str | None,
) -> None:
    """Run the job in FILE on this machine: prepare, train, publish.

    Of a QLoRASweep, run its cells one after the other; with cellsPerPod, those of a pod are trained in one process.
    Ctrl-C saves a checkpoint and stops. With --resume, FILE and the options default to those of the run in the
    workspace. A workspace with the run of other settings or data is rejected before anything is trained; --restart
    discards that run. The exit code is that of the step that failed first.
    """
    if restart and resume:
        raise click.UsageError("--restart starts over, and --resume continues: leave one of them out.")
    document, earlier = _what_to_run(file, workspace, resume=resume)
    chosen = device or next((each.device for each in earlier), None)
    options = _Options(
        workspace, claims, config_maps, chosen or ("cuda" if has_gpu() else "cpu"), continues, benchmarks
    )
    sweep = _sweep(document, options, earlier) if isinstance(document, QLoRASweepDocument) else None
    runs = [options.of(document).resuming(*earlier)] if isinstance(document, QLoRAJobDocument) else []
    every_run = runs if sweep is None else sweep.every_run
    problems = dict.fromkeys(problem for run in every_run for problem in _problems(run))
    if problems:
        _fail("\n".join(problems))
    if importlib.util.find_spec("torch") is None:
        _fail(f"the trainer is not installed: {INSTALL}")
    console = Console(emoji=False, quiet=output is not None)
    if chosen is None:
        console.print(f"Training on {options.device}; choose with --device.", highlight=False)
    if restart:
        _discard(every_run, console)
    bar = progress_bar(console)
    try:
        if sweep is not None:
            ended = run_sweep(sweep, lambda run: _display(run, console, bar, named=True, output=output))
        else:
            ended = {"": run_steps(runs[0], _display(runs[0], console, bar, named=False, output=output))}
    except OSError as error:
        _fail(f"--workspace {workspace} cannot be written: {error.strerror}")
    finally:
        bar.stop()
    if any(each.stopped_by is not None for each in ended.values()):
        command = shlex.join(["qlora", "run", "--resume", "--workspace", str(workspace)])
        console.print(f"To resume:\n  {command}", highlight=False, markup=False, soft_wrap=True)
    elif sweep is not None:
        show_ends(sweep, ended, console)
    else:
        show_end(ended[""], runs[0], console)
    sys.exit(next((each.exit_code for each in ended.values() if each.exit_code), 0))


@dataclass(frozen=True)
class _Options:
    """The command line's options for every run."""

    workspace: Path
    claims: dict[str, Path]
    config_maps: dict[str, Path]
    device: Device
    continues: Path | None
    benchmarks: Path | None

    def of(self, document: QLoRAJobDocument) -> LocalRun:
        """The run of that job."""
        run = LocalRun(document, self.workspace, self.claims, self.config_maps, self.device, self.continues)
        return replace(run, benchmarks=self.benchmarks)


def _what_to_run(file: Path | None, workspace: Path, *, resume: bool) -> tuple[Document, list[LocalRun]]:
    """Read the document in FILE, or the run in the workspace, and the runs to resume."""
    document = _load(file) if file is not None else None
    try:
        sweep = earlier_sweep(workspace) if resume or isinstance(document, QLoRAJobDocument) else None
        if sweep is not None and isinstance(document, QLoRAJobDocument):
            _fail(f"{workspace} holds the run of a sweep: name another --workspace, such as that of a cell in it")
        if sweep is not None:
            return document or sweep[0], sweep[1]
        if isinstance(document, QLoRASweepDocument) and resume:
            _fail(f"{workspace} holds no run of a sweep to resume: leave --resume out to start one")
        earlier = [LocalRun.recall(workspace)] if resume else []
    except ValueError as error:
        _fail(str(error))
    if document is None and not earlier:
        raise click.UsageError("Missing argument 'FILE': name the manifest, or resume an earlier run with --resume.")
    return document or earlier[0].document, earlier


def _sweep(document: QLoRASweepDocument, options: _Options, earlier: Sequence[LocalRun]) -> LocalSweep:
    if options.continues is not None:
        _fail("--continues is for a job that names another one in spec.continues, and FILE is a sweep: remove it")
    cell = QLoRAJobDocument(
        api_version="qlora.dev/v1beta1",
        kind="QLoRAJob",
        metadata=ObjectMeta(name=document.metadata.name),
        spec=document.spec.template.spec,
    )
    try:
        return LocalSweep.of(document, earlier, options.of(cell))
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)


def _display(run: LocalRun, console: Console, bar: Progress, *, named: bool, output: str | None) -> Display:
    if output is not None:
        return RecordDisplay()
    return ConsoleDisplay(console, run.layout.records, job=run.document.metadata.name if named else "", bar=bar)


def _problems(run: LocalRun) -> list[str]:
    """Return the problems that keep the job from running here, one sentence each."""
    if (nodes := run.document.spec.resources.node_count) > 1:
        return [f"spec.resources.nodes is {nodes}, and this command runs a job on one machine: remove it from FILE"]
    problems = missing_sources(run.document.spec, run.claims, run.config_maps, run.continues)
    if run.document.spec.benchmarks and run.benchmarks is None:
        problems.append("spec.gate.benchmarks needs tasks: give the folder with --benchmarks DIR")
    return problems


def _discard(runs: Sequence[LocalRun], console: Console) -> None:
    """Discard the earlier runs in these workspaces, and print what was deleted."""
    try:
        deleted = discard_runs(runs)
    except StepFailure as failure:
        _fail(failure.message, failure.exit_code)
    except (OSError, ValueError) as error:
        _fail(f"--restart: the earlier run cannot be discarded: {error}")
    for path in deleted:
        console.print(f"Deleted {path}", highlight=False, markup=False, soft_wrap=True)
