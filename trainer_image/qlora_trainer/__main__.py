"""The trainer's command line: runs one step and turns its end into a result record and an exit code."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, get_args

import click

from qlora_api import contract
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.naming import workspace_folder
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_api.status import StepName
from qlora_api.v1alpha1 import QLoRAJobDocument, QLoRAJobSpec
from qlora_trainer.core import process
from qlora_trainer.core.context import Device, Mounts, StepContext, load_document
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.outcome import (
    Completion,
    Ending,
    Terminated,
    classify,
    result_record,
    summary,
    workspace_unusable,
)
from qlora_trainer.core.process import Streams
from qlora_trainer.core.records import RecordWriter, redact, timestamp
from qlora_trainer.training.launch import end_with_parent, named_rank


@dataclass(frozen=True)
class Invocation:
    """What the command line and the pod's environment say."""

    step: StepName
    job: Path
    workspace: Path
    mounts: Mounts
    device: Device
    pod_uid: str
    attempt: int
    claim: str
    termination_log: Path | None
    rank: int = 0
    """Which of the processes that train together this is, as torchrun says."""


def _now() -> datetime:
    return datetime.now(UTC)


def _folders(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    pairs = [value.partition("=") for value in values]
    for name, separator, folder in pairs:
        if not (name and separator and folder):
            raise click.BadParameter(f"found {name!r}, must be {parameter.metavar}")
    return {name: Path(folder).absolute() for name, _, folder in pairs}


_EXISTING_LOG = contract.TERMINATION_LOG if Path(contract.TERMINATION_LOG).exists() else None

_OPTIONS = (
    click.option("--job", type=click.Path(path_type=Path), default=Path(contract.JOB_FILE), help="The QLoRAJob, JSON."),
    click.option(
        "--workspace",
        type=click.Path(path_type=Path),
        default=Path(contract.WORKSPACE_MOUNT),
        help="The job's own folder.",
    ),
    click.option("--volume", multiple=True, metavar="CLAIM=DIR", callback=_folders, help="Where a pvc:// claim lies."),
    click.option(
        "--config-map", multiple=True, metavar="NAME=DIR", callback=_folders, help="Where a configMap:// lies."
    ),
    click.option(
        "--termination-log",
        type=click.Path(path_type=Path),
        default=_EXISTING_LOG,
        help="File that gets the result record too.",
    ),
    click.option(
        "--device",
        type=click.Choice(get_args(Device)),
        default="cuda",
        envvar=contract.ENV_DEVICE,
        show_envvar=True,
        help="Where training runs.",
    ),
    click.option("--pod-uid", default="local", envvar=contract.ENV_POD_UID, show_envvar=True),
    click.option("--attempt", type=click.IntRange(min=1), default=1, envvar=contract.ENV_ATTEMPT, show_envvar=True),
    click.option(
        "--claim",
        default="",
        envvar=contract.ENV_OUTPUT_CLAIM,
        show_envvar=True,
        help="Name of the claim that the workspace lies on.",
    ),
)


@click.group(context_settings={"show_default": True, "max_content_width": 120})
def main() -> None:
    """Fine-tune a language model with QLoRA, one step at a time. Standard output carries records only."""


def _step_command(step: StepName, help_text: str) -> None:
    def command(volume: dict[str, Path], config_map: dict[str, Path], **options: object) -> None:
        run(Invocation(step=step, mounts=Mounts(claims=volume, config_map_folders=config_map), **options))  # type: ignore[arg-type]

    for option in reversed(_OPTIONS):
        command = option(command)
    main.command(step, help=help_text)(command)


_step_command("prepare", "Check the model and the data, and lay both out in the workspace.")
_step_command("train", "Train the adapter, from the newest checkpoint if there is one.")
_step_command("publish", "Verify the adapter and put it where it belongs, with a report.")
_step_command("clean", "Delete what the steps needed only for themselves.")


def run(invocation: Invocation) -> NoReturn:
    """Run the step and end the process with its exit code; the result record is the last thing it says."""
    end_with_parent()
    stop = StopRequest()
    process.on_termination(stop.set if invocation.step == "train" else _terminate)
    streams = process.claim_streams()
    rank = named_rank(os.environ) if invocation.step == "train" else 0
    if rank:
        # One process speaks for all.
        streams = replace(streams, records=os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        invocation = replace(invocation, rank=rank, termination_log=None)
    records = RecordWriter(streams.records, time.monotonic)
    completion: Completion | None = None
    try:
        completion = _perform(invocation, records, stop)
        ending = Ending(ExitCode.DONE, summary(completion, invocation.step))
    except BaseException as error:  # noqa: BLE001 - however a step ends, the operator is told
        process.ignore_termination()
        ending = classify(error)
        if ending.unexpected:
            streams.errors.write(redact("".join(traceback.format_exception(error))))
    process.ignore_termination()
    _conclude(invocation, ending, completion, records, streams)


def _terminate() -> NoReturn:
    raise Terminated


def _perform(invocation: Invocation, records: RecordWriter, stop: StopRequest) -> Completion | None:
    layout = WorkspaceLayout(invocation.workspace.absolute())
    # Cleaning must work on a full volume, and loads no library that prints.
    if invocation.step != "clean":
        heading = f"{timestamp(_now())} {invocation.step}, attempt {invocation.attempt}, pod {invocation.pod_uid}"
        try:
            name = f"{invocation.step}.rank-{invocation.rank}" if invocation.rank else invocation.step
            process.log_to(layout.records / f"{name}.log", heading)
        except OSError as error:
            raise workspace_unusable(error, layout.root) from error
    document = load_document(invocation.job)
    process.set_environment(invocation.step, layout.root, publishes_to_hub=_publishes_to_hub(document.spec))
    context = StepContext(
        document=document,
        workspace=layout,
        mounts=invocation.mounts,
        device=invocation.device,
        pod_uid=invocation.pod_uid,
        attempt=invocation.attempt,
        workspace_uri=_workspace_uri(invocation, document),
        registries=tuple(os.environ.get(contract.ENV_REGISTRIES, "").split()),
    )
    return _steps()[invocation.step](context, records, stop)


def _publishes_to_hub(spec: QLoRAJobSpec) -> bool:
    merged = spec.output.merged.destination if spec.output.merged else None
    return any(uri and isinstance(parse_source(uri), HubSource) for uri in (spec.output.destination, merged))


def _conclude(
    invocation: Invocation,
    ending: Ending,
    completion: Completion | None,
    records: RecordWriter,
    streams: Streams,
) -> NoReturn:
    record = result_record(
        ending,
        completion,
        records.facts,
        step=invocation.step,
        job_uid=_job_uid(invocation.job),
        pod_uid=invocation.pod_uid,
        attempt=invocation.attempt,
        time=timestamp(_now()),
    )
    try:
        records.result(record, invocation.termination_log)
    except OSError as error:
        streams.errors.write(f"the result record could not be written: {error}\n")
    streams.errors.flush()
    # A library that crashes or hangs while the interpreter shuts down must not turn a verified result into a failure.
    os._exit(ending.exit_code)


def _job_uid(job: Path) -> str:
    """The UID in the job's document, also in one that is otherwise wrong, so that the operator accepts the record."""
    try:
        uid = json.loads(job.read_bytes())["metadata"]["uid"]
    except (OSError, ValueError, KeyError, TypeError):
        return "local"
    return str(uid)[:64] or "local"


def _workspace_uri(invocation: Invocation, document: QLoRAJobDocument) -> str:
    workspace, mount = invocation.workspace.absolute(), Path(contract.WORKSPACE_MOUNT)
    if not invocation.claim:
        return str(workspace)
    if workspace.is_relative_to(mount):
        return str(VolumeSource(invocation.claim, str(workspace.relative_to(mount)).removeprefix(".")))
    return f"pvc://{invocation.claim}/{workspace_folder(document.metadata.name, document.metadata.uid)}"


Step = Callable[[StepContext, RecordWriter, StopRequest], Completion | None]


def _steps() -> dict[StepName, Step]:
    """The steps. Each imports what it needs when it runs: a signal must find its handler before torch is loaded."""

    def prepare(context: StepContext, records: RecordWriter, _stop: StopRequest) -> Completion:
        from qlora_trainer.prepare import prepare

        return prepare(context, records)

    def train(context: StepContext, records: RecordWriter, stop: StopRequest) -> Completion:
        from qlora_trainer.train import train

        return train(
            context,
            records,
            stop=stop,
            now=_now,
            monotonic=time.monotonic,
            command=[sys.executable, *sys.orig_argv[1:]],
        )

    def publish(context: StepContext, records: RecordWriter, _stop: StopRequest) -> Completion:
        from qlora_trainer.publish import publish

        return publish(context, records, now=_now)

    def clean(context: StepContext, _records: RecordWriter, _stop: StopRequest) -> None:
        from qlora_trainer.clean import clean

        clean(context.workspace)

    return {"prepare": prepare, "train": train, "publish": publish, "clean": clean}


if __name__ == "__main__":
    main()
