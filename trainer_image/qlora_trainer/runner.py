"""Runs one step as a process: streams, signals, and the end of it as a result record and an exit code."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

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
    CompletionRecord,
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
    completion: CompletionRecord | None = None
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


def _perform(invocation: Invocation, records: RecordWriter, stop: StopRequest) -> CompletionRecord | None:
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
    completion: CompletionRecord | None,
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


Step = Callable[[StepContext, RecordWriter, StopRequest], CompletionRecord | None]


def _steps() -> dict[StepName, Step]:
    """The steps. Each imports what it needs when it runs: a signal must find its handler before torch is loaded."""

    def prepare(context: StepContext, records: RecordWriter, _stop: StopRequest) -> CompletionRecord:
        from qlora_trainer.steps.prepare import prepare

        return prepare(context, records)

    def train(context: StepContext, records: RecordWriter, stop: StopRequest) -> CompletionRecord:
        from qlora_trainer.steps.train import train

        return train(
            context,
            records,
            stop=stop,
            now=_now,
            monotonic=time.monotonic,
            command=[sys.executable, *sys.orig_argv[1:]],
        )

    def publish(context: StepContext, records: RecordWriter, _stop: StopRequest) -> CompletionRecord:
        from qlora_trainer.steps.publish import publish

        return publish(context, records, now=_now)

    def clean(context: StepContext, _records: RecordWriter, _stop: StopRequest) -> None:
        from qlora_trainer.steps.clean import clean

        clean(context.workspace)

    return {"prepare": prepare, "train": train, "publish": publish, "clean": clean}
