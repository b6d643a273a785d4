"""Runs one step as a process, and ends with a result record and an exit code."""

import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from qlora_api import contract
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.naming import workspace_folder
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import StepName
from qlora_trainer.core import process
from qlora_trainer.core.compile_later import load_bitsandbytes
from qlora_trainer.core.context import Device, Mounts, StepContext, load_document
from qlora_trainer.core.environment import process_started
from qlora_trainer.core.failures import StepFailure, StopRequest
from qlora_trainer.core.network import use_network
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
from qlora_trainer.training.distributed.launch import end_with_parent, number_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Invocation:
    """The step's input from the command line and the pod's environment."""

    step: StepName
    job: Path
    """The job's document, JSON."""
    workspace: Path
    mounts: Mounts
    device: Device
    pod_uid: str
    attempt: int
    """Counted from 1."""
    claim: str
    """The claim of the workspace, or an empty string on a laptop."""
    termination_log: Path | None
    rank: int = 0
    """Which of the processes that train together this is, as torchrun sets it."""
    node: int = 0
    """Which of the train pods this is, if there are several."""
    others: Sequence[tuple[Path, Path]] = ()
    """Documents and workspaces of further jobs to train together with the job."""


def _now() -> datetime:
    return datetime.now(UTC)


def run(invocation: Invocation) -> NoReturn:
    """Run the step, print its result record last, and end with its exit code."""
    end_with_parent()
    stop = StopRequest()
    process.on_termination(stop.set if invocation.step == "train" else _terminate)
    streams = process.claim_streams()
    rank = number_in(os.environ, "RANK") if invocation.step == "train" else 0
    if rank:
        # Only rank 0 writes records.
        streams = replace(streams, records=os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        invocation = replace(invocation, rank=rank, termination_log=None)
    elif invocation.step == "train":
        invocation = replace(invocation, node=number_in(os.environ, contract.ENV_NODE))
    # Node 0 alone reports progress; the others report how they end.
    records = RecordWriter(streams.records, time.monotonic, reports_progress=invocation.node == 0)
    completion: CompletionRecord | None = None
    try:
        completion = _perform(invocation, records, stop)
        ending = Ending(ExitCode.DONE, summary(completion, invocation.step))
    except BaseException as error:  # noqa: BLE001 - however a step ends, the operator gets its result
        process.ignore_termination()
        ending = classify(error)
        if ending.is_unexpected:
            streams.errors.write(redact("".join(traceback.format_exception(error))))
    process.ignore_termination()
    _conclude(invocation, ending, completion, records, streams)


def _terminate() -> NoReturn:
    raise Terminated


def _perform(invocation: Invocation, records: RecordWriter, stop: StopRequest) -> CompletionRecord | None:
    """Prepare the process for the step, and run it. Raises errors that end the step."""
    workspace = WorkspaceLayout(invocation.workspace.absolute())
    # `clean` must work on a full volume, and loads no library that prints.
    if invocation.step != "clean":
        _open_log(invocation, workspace)
    # The first operators did not state it. On a laptop there is no operator, and no claim.
    version = os.environ.get(contract.ENV_CONTRACT_VERSION, "1" if invocation.claim else str(contract.CONTRACT_VERSION))
    require_known_contract(version)
    document = load_document(invocation.job)
    to_hub = any(isinstance(parse_source(uri), HubSource) for uri in document.spec.output.destinations.values())
    process.set_environment(invocation.step, workspace.root, device=invocation.device, publishes_to_hub=to_hub)
    if invocation.step in ("prepare", "publish"):
        use_network(os.environ, Path(tempfile.gettempdir()))
    context = StepContext(
        document=document,
        workspace=workspace,
        mounts=invocation.mounts,
        device=invocation.device,
        pod_uid=invocation.pod_uid,
        attempt=invocation.attempt,
        workspace_uri=_workspace_uri(workspace.root, invocation.claim, document),
        started=process_started(),
        contract_version=int(version),
        registries=tuple(os.environ.get(contract.ENV_REGISTRIES, "").split()),
        gpu_hour_price=os.environ.get(contract.ENV_GPU_HOUR_PRICE, ""),
        rungs=tuple(int(step) for step in os.environ.get(contract.ENV_RUNGS, "").split(",") if step),
        group_size=int(os.environ.get(contract.ENV_GROUP_SIZE, "1")),
    )
    if invocation.step != "clean":
        load_bitsandbytes()
    if invocation.others:
        return _train_together((context, *_others(invocation, context)), records, stop)
    return _run_step(invocation.step, context, records, stop)


def _others(invocation: Invocation, context: StepContext) -> Iterator[StepContext]:
    """The contexts of the further jobs, in this pod."""
    for job, folder in invocation.others:
        document, workspace = load_document(job), WorkspaceLayout(folder.absolute())
        uri = _workspace_uri(workspace.root, invocation.claim, document)
        # Of no separate Job: an end of this pod does not show whether the job could be trained alone.
        yield replace(context, document=document, workspace=workspace, workspace_uri=uri, attempt=0)


def require_known_contract(version: str) -> None:
    """Raise StepFailure (UNSUPPORTED_CONTRACT) if the operator needs a newer trainer."""
    if not version.isdigit() or int(version) > contract.CONTRACT_VERSION:
        raise StepFailure(
            ExitCode.UNSUPPORTED_CONTRACT,
            f"this trainer supports the contract up to version {contract.CONTRACT_VERSION}, and the operator works "
            f"with version {version}: set the profile's image to the trainer of the operator's release",
        )


def _open_log(invocation: Invocation, workspace: WorkspaceLayout) -> None:
    """Send what libraries print to a log in the workspace. Raises StepFailure."""
    heading = f"{timestamp(_now())} {invocation.step}, attempt {invocation.attempt}, pod {invocation.pod_uid}"
    name: str = invocation.step
    if invocation.rank:
        name += f".rank-{invocation.rank}"
    elif invocation.node:
        name += f".node-{invocation.node}"
    try:
        process.log_to(workspace.records / f"{name}.log", heading)
    except OSError as error:
        raise workspace_unusable(error, workspace.root) from error


def _workspace_uri(workspace: Path, claim: str, document: QLoRAJobDocument) -> str:
    """The address of the workspace: pvc://CLAIM/FOLDER, or its path without a claim."""
    mount = Path(contract.WORKSPACE_MOUNT)
    if not claim:
        return str(workspace)
    if workspace.is_relative_to(mount):
        return str(VolumeSource(claim, str(workspace.relative_to(mount)).removeprefix(".")))
    return f"pvc://{claim}/{workspace_folder(document.metadata.name, document.metadata.uid)}"


def _conclude(
    invocation: Invocation,
    ending: Ending,
    completion: CompletionRecord | None,
    records: RecordWriter,
    streams: Streams,
) -> NoReturn:
    """Write the result record and end the process."""
    record = result_record(
        ending,
        completion,
        records.findings,
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
    """The UID in the job's document, even if the rest of it is wrong."""
    try:
        uid = json.loads(job.read_bytes())["metadata"]["uid"]
    except (OSError, ValueError, KeyError, TypeError):
        return "local"
    return str(uid)[:64] or "local"


def _run_step(
    step: StepName, context: StepContext, records: RecordWriter, stop: StopRequest
) -> CompletionRecord | None:
    # Each is imported when it runs: the handler of signals must be in place before torch is loaded.
    if step == "prepare":
        from qlora_trainer.steps.prepare import prepare

        return prepare(context, records)
    if step == "train":
        from qlora_trainer.steps.train import train

        command = [sys.executable, *sys.orig_argv[1:]]
        return train(context, records, stop=stop, now=_now, monotonic=time.monotonic, command=command)
    if step == "publish":
        from qlora_trainer.steps.publish import publish

        return publish(context, records, now=_now)
    from qlora_trainer.steps.clean import clean

    clean(context.workspace)
    return None


def _train_together(contexts: Sequence[StepContext], records: RecordWriter, stop: StopRequest) -> CompletionRecord:
    """Train the first job and others.

    The end of each other one is in its workspace, for a separate step.
    """
    from qlora_trainer.steps.train_together import train_together

    writers = [records, *(records.beside() for _ in contexts[1:])]
    results = train_together(contexts, writers, stop=stop, now=_now, monotonic=time.monotonic)
    for context, result in zip(contexts[1:], results[1:], strict=True):
        if isinstance(result, StepFailure):
            logger.warning("%s failed: %s", context.document.metadata.name, result.message)
    if isinstance(results[0], StepFailure):
        raise results[0]
    return results[0]
