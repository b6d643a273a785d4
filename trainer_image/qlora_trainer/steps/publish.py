"""The step `publish`: verify, report, publish, merge, and upload the history."""

import hashlib
import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from qlora_api.artifact_status import AdapterStatus
from qlora_api.contract import WorkspaceLayout, is_signed
from qlora_api.schema import replace
from qlora_api.spec.output import TrackingStatus
from qlora_api.status import StepName
from qlora_trainer.core.completion import (
    PrepareRecord,
    PublishRecord,
    TrainRecord,
    asked_sha256,
    read_completion,
    write_completion,
)
from qlora_trainer.core.context import StepContext, base_name
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CURVE_FILE,
    GGUF_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    MODEL_CARD_FILE,
    REPORT_FILE,
)
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.paths import confine
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.history.metrics_log import metrics_table, read_history
from qlora_trainer.model.adapter.initial import read_initial_adapter
from qlora_trainer.model.base.cache import require_whole_in_cache
from qlora_trainer.publishing.gate import check_gate, gate_failure
from qlora_trainer.publishing.gguf import GgufFile, gguf_file
from qlora_trainer.publishing.lineage import publish_with_lineage, read_signing_key
from qlora_trainer.publishing.merged_model import is_merged_published, publish_merged
from qlora_trainer.publishing.tokenizer import has_chat_template, tokenizer_files
from qlora_trainer.publishing.tracking import upload_run
from qlora_trainer.publishing.trained_base import is_base_published, publish_base
from qlora_trainer.publishing.verify import require_own_training, verify_adapter
from qlora_trainer.report.learning import learned_little
from qlora_trainer.report.model_card import adapter_model_card, quantization_label
from qlora_trainer.report.page import published_page, write_report
from qlora_trainer.report.serving import served_rank
from qlora_trainer.report.sweep_page import add_to_sweep_report
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.destinations.addresses import JobDestinations
from qlora_trainer.stores.destinations.destination import Destination, is_published
from qlora_trainer.training.prepared_job import PreparedJob

logger = logging.getLogger(__name__)

_Completion = TypeVar("_Completion", PrepareRecord, TrainRecord)


def publish(context: StepContext, records: RecordWriter, *, now: Callable[[], datetime]) -> PublishRecord:
    """Verify the trained adapter, write the report and publish to the destination. `now` gives the time for records.

    Returns early if the completion record matches, and the files at the destination match it.
    Raises StepFailure; the adapter is not published then, unless it is the base or the merge that has failed. One that
    does not pass spec.gate (GATE_FAILED) reaches no destination, and neither do its base and a merged model.
    """
    workspace, mounts, identity, device = context.workspace, context.mounts, context.identity, context.device
    job, namespace = _trained_job(context), context.document.metadata.namespace

    def report(activity: str) -> None:
        records.progress(identity.progress("publish", now(), activity))

    def track(record: PublishRecord) -> PublishRecord:
        tracking = upload_run(job, record, context.secret("tracking"), workspace, namespace, report)
        return _add_tracking(record, tracking, workspace.completion("publish"))

    def verify() -> tuple[Path, bytes]:
        report("verifying the adapter")
        folder = _verify(job, workspace)
        report("writing the report")
        return folder, write_report(job, workspace, device=device)

    records.note(gate=job.gate)
    if job.gate is not None and not job.gate.passed:
        folder, picture = verify()
        # Here it stays, longer than the prepared data with the template.
        for name, content in _describe(job, workspace, picture).items():
            write_atomically(folder / name, content if isinstance(content, bytes) else content.read_bytes())
        _add_to_sweep(job, workspace.report, mounts.sweep)
        raise gate_failure(job.gate, f"{context.workspace_uri}/{job.trained.adapter_path}")
    secret, owner = context.secret("output"), identity.pod_uid
    destinations = JobDestinations(
        job.spec.output, workspace, context.workspace_uri, mounts, secret, context.registries, owner
    )
    destination = destinations.adapter()
    done = _find_published(job, workspace, destination, destinations, has_key=mounts.signing_key.is_file())
    if done is not None:
        # The attempt before may have been killed before it had written the page of the sweep.
        _add_to_sweep(job, workspace.report, mounts.sweep)
        return track(replace(done, gate=job.gate))
    key = read_signing_key(mounts.signing_key)
    folder, picture = verify()
    report(f"writing to {destination.uri}")
    page, wanted = None, job.spec.output.report
    if wanted != "none":
        page = published_page(job, workspace, device=device, samples=wanted == "full")
    with gguf_file(job, folder, workspace) as gguf:
        contents = {
            ADAPTER_FILE: folder / ADAPTER_FILE,
            ADAPTER_CONFIG_FILE: folder / ADAPTER_CONFIG_FILE,
            **_describe(job, workspace, picture),
            **({} if page is None else {REPORT_FILE: page}),
            **({} if gguf is None else {GGUF_FILE: gguf.path}),
        }
        uri = publish_with_lineage(job, destination, contents, namespace=namespace, key=key)
        remark = learned_little(job.trained, read_history(workspace.report / HISTORY_FILE))
        adapter = _adapter_status(uri, job, folder, gguf, signed=key is not None, remark=remark)
    base_folder = workspace.root / job.prepared.base_path
    base, merged = None, None
    if (wanted_base := job.spec.output.base) is not None:
        require_whole_in_cache(base_folder, mounts.model_cache)
        report(f"writing the base to {wanted_base.destination}")
        base = publish_base(job, workspace, destinations.base(wanted_base), wanted_base.written_type)
    if (destination_of_merged := destinations.merged()) is not None:
        require_whole_in_cache(base_folder, mounts.model_cache)
        merged = publish_merged(job, workspace, destination_of_merged, report)
        write_report(job, workspace, device=device, merged=merged)
    record = PublishRecord(
        fingerprint=_fingerprint(job.trained, destination),
        adapter=adapter,
        gate=job.gate,
        base=base,
        merged=merged,
        report_sha256=None if page is None else hashlib.sha256(page).hexdigest(),
    )
    write_completion(workspace.completion("publish"), record)
    _add_to_sweep(job, workspace.report, mounts.sweep)
    return track(record)


def read_published(context: StepContext) -> TrainRecord | None:
    """The record of train, if its adapter is published and publish would have nothing to do. None otherwise.

    Raises StepFailure if the destination cannot be reached.
    """
    workspace, identity = context.workspace, context.identity
    written = read_completion(workspace.completion("publish"), PublishRecord)
    if written is None or read_completion(workspace.completion("train"), TrainRecord) is None:
        return None
    prepared = read_completion(workspace.completion("prepare"), PrepareRecord)
    if prepared is None or prepared.asked != asked_sha256(context.spec):
        return None
    job = _trained_job(context)
    own = PreparedJob.from_record(context, job.prepared, context.spec.resources.gpu_count)
    if job.trained.fingerprint != own.digest or (job.gate is not None and not job.gate.passed):
        return None
    destinations = JobDestinations(
        job.spec.output,
        workspace,
        context.workspace_uri,
        context.mounts,
        context.secret("output"),
        context.registries,
        identity.pod_uid,
    )
    done = _find_published(
        job, workspace, destinations.adapter(), destinations, has_key=is_signed(context.contract_version)
    )
    return None if done is None else job.trained


def _add_tracking(record: PublishRecord, tracking: TrackingStatus | None, path: Path) -> PublishRecord:
    """Record at `path` the uploads to trackers, which can be repeated."""
    if tracking == record.tracking:
        return record
    record = replace(record, tracking=tracking)
    try:
        write_completion(path, record)
    except OSError as error:
        # Only a later attempt would read it, which uploads the same run again.
        logger.warning("the upload of the run is not recorded: %s", error)
    return record


def _add_to_sweep(job: TrainedJob, report: Path, sweep: Path | None) -> None:
    """Update the report of the sweep, if the job is a cell of one."""
    # After everything else: other pods write what it shows, and none of that may cost this cell its adapter.
    if sweep is None:
        return
    try:
        add_to_sweep_report(job, report, sweep)
    except (OSError, ValueError) as error:
        logger.warning("the report of the sweep cannot be written: %s", error)


def _trained_job(context: StepContext) -> TrainedJob:
    """The job with earlier records and the gate's result. Raises StepFailure."""
    trained = _require_record(context.workspace.completion("train"), "train", TrainRecord)
    prepared = _require_record(context.workspace.completion("prepare"), "prepare", PrepareRecord)
    pairs = context.spec.training.compares_answers
    return TrainedJob(
        name=context.document.metadata.name,
        uid=context.identity.job_uid,
        spec=prepared.resolve(context.spec),
        base_name=base_name(context.spec.model),
        prepared=prepared,
        trained=trained,
        gate=check_gate(context.spec.gate, trained, pairs=pairs, prepared=prepared.fingerprint),
        gpu_hour_price=context.gpu_hour_price,
        has_chat_template=has_chat_template(prepared, context.workspace.root / prepared.model_path),
    )


def _require_record(path: Path, step: StepName, kind: type[_Completion]) -> _Completion:
    record = read_completion(path, kind)
    if record is None:
        raise bad_configuration(
            f"{path} is missing or of another release: run the {step} step first, in this workspace"
        )
    return record


def _find_published(
    job: TrainedJob,
    workspace: WorkspaceLayout,
    destination: Destination,
    destinations: JobDestinations,
    *,
    has_key: bool,
) -> PublishRecord | None:
    """Return the completion record if it is of this adapter and every file matches."""
    record = read_completion(workspace.completion("publish"), PublishRecord)
    if record is None or record.fingerprint != _fingerprint(job.trained, destination):
        return None
    if has_key and record.adapter.lineage != "signed":
        return None
    merged = destinations.merged()
    if merged is not None and not is_merged_published(merged, record.merged):
        return None
    base = job.spec.output.base
    if base is not None and not (
        record.base and is_base_published(job, workspace, destinations.base(base), base.written_type)
    ):
        return None
    manifest = destination.read_manifest()
    if manifest is None or ADAPTER_FILE not in manifest.files:
        return None
    same = manifest.files[ADAPTER_FILE].sha256 == job.trained.adapter_sha256
    return record if same and is_published(destination, manifest) else None


def _fingerprint(trained: TrainRecord, destination: Destination) -> str:
    parts = [trained.fingerprint, trained.adapter_sha256, destination.uri]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _verify(job: TrainedJob, workspace: WorkspaceLayout) -> Path:
    """Return the folder of the trained adapter, after every check. Raises StepFailure."""
    prepared, trained, initial = job.prepared, job.trained, job.prepared.initial_adapter
    require_own_training(prepared, trained, job.spec, workspace)
    folder = confine(workspace.root / trained.adapter_path, workspace.root)
    verify_adapter(
        folder,
        trained.adapter_sha256,
        job.spec.lora,
        model_folder=workspace.root / prepared.model_path,
        target_modules=prepared.target_modules,
        base_name=job.base_name,
        base_revision=prepared.model_revision,
        initial=None if initial is None else read_initial_adapter(workspace.initial_adapter, initial.sha256),
    )
    return folder


def _describe(job: TrainedJob, workspace: WorkspaceLayout, picture: bytes) -> Contents:
    """The adapter's model card, the picture of its loss with the numbers, and the tokenizer."""
    history = read_history(workspace.report / HISTORY_FILE)
    card = adapter_model_card(job, history).encode()
    run = {MODEL_CARD_FILE: card, CURVE_FILE: picture, METRICS_FILE: metrics_table(history)}
    return {**run, **tokenizer_files(job.prepared, workspace)}


def _adapter_status(
    uri: str, job: TrainedJob, folder: Path, gguf: GgufFile | None, *, signed: bool, remark: str | None
) -> AdapterStatus:
    """The status of the adapter in `folder`, published at `uri`."""
    return AdapterStatus(
        uri=uri,
        sha256=job.trained.adapter_sha256,
        size_bytes=(folder / ADAPTER_FILE).stat().st_size,
        base_model=job.spec.model.source,
        base_revision=job.prepared.model_revision,
        rank=job.spec.lora.rank,
        step=job.trained.kept_step,
        served_rank=served_rank(job.spec.lora),
        quantization=quantization_label(job.spec.quantization),
        initial_adapter=job.prepared.initial_adapter,
        lineage="signed" if signed else "unsigned",
        remark=remark,
        gguf=None if gguf is None else gguf.status,
    )
