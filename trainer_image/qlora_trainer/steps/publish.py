"""The step `publish`: the adapter verified, described, and put where it belongs."""

import hashlib
import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from qlora_api.contract import ProgressRecord
from qlora_api.status import AdapterStatus, StepName
from qlora_api.v1alpha1 import MUTABLE_FIELDS
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, CARD_FILE, CURVE_FILE
from qlora_trainer.core.paths import confined
from qlora_trainer.core.records import RecordWriter, timestamp
from qlora_trainer.publishing.addresses import open_destination
from qlora_trainer.publishing.destination import Destination, is_published, publish_folder
from qlora_trainer.publishing.manifest import Manifest
from qlora_trainer.publishing.merged import publish_merged, still_published
from qlora_trainer.publishing.verify import require_own_training, verify_adapter
from qlora_trainer.publishing.volume_folder import VolumeFolder
from qlora_trainer.report.card import model_card, quantization_label
from qlora_trainer.report.page import write_report
from qlora_trainer.report.serving import served_rank
from qlora_trainer.stores.contents import Contents, describe_files

_LIBRARIES = ("qlora-operator", "torch", "transformers", "peft", "bitsandbytes", "safetensors")
_Completion = TypeVar("_Completion", PrepareRecord, TrainRecord)


def publish(context: StepContext, records: RecordWriter, *, now: Callable[[], datetime]) -> PublishRecord:
    """Verify the trained adapter, write the report and publish to the destination. `now` gives the time for records.

    Returns at once if the completion record matches and the files at the destination are still what it says.
    Raises StepFailure; nothing is published then.
    """

    def say(activity: str) -> None:
        time = timestamp(now())
        records.progress(
            ProgressRecord(
                job_uid=context.job_uid, pod_uid=context.pod_uid, step="publish", time=time, activity=activity
            )
        )

    prepared = _required(context, "prepare", PrepareRecord)
    trained = _required(context, "train", TrainRecord)
    destination = _destination(context, context.spec.output.destination, context.workspace.adapter)
    done = _already_published(context, trained, destination)
    if done is not None:
        return done
    say("verifying the adapter")
    require_own_training(context, prepared, trained)
    adapter = _verified(context, prepared, trained)
    say("drawing the report")
    picture = write_report(context, prepared, trained)
    contents: dict[str, Path | bytes] = {
        ADAPTER_FILE: adapter / ADAPTER_FILE,
        ADAPTER_CONFIG_FILE: adapter / ADAPTER_CONFIG_FILE,
        CARD_FILE: model_card(context, prepared, trained).encode(),
        CURVE_FILE: picture,
    }
    manifest = _manifest(context, prepared, trained, contents)
    say(f"writing to {destination.uri}"[:128])
    uri = publish_folder(destination, contents, manifest)
    merged, merged_destination = None, _merged_destination(context)
    if merged_destination is not None:
        describe = partial(_manifest, context, prepared, trained)
        merged = publish_merged(context, prepared, trained, merged_destination, describe, say)
        write_report(context, prepared, trained, merged)
    record = PublishRecord(
        fingerprint=_fingerprint(trained, destination),
        adapter=AdapterStatus(
            uri=uri,
            sha256=trained.adapter_sha256,
            size_bytes=manifest.files[ADAPTER_FILE].size,
            base_model=context.spec.model.source,
            base_revision=prepared.model_revision,
            rank=context.spec.lora.rank,
            served_rank=served_rank(context.spec.lora),
            quantization=quantization_label(
                context.spec.quantization.type, double=context.spec.quantization.double_quant
            ),
        ),
        merged=merged,
    )
    write_completion(context.workspace.completion("publish"), record)
    return record


def _required(context: StepContext, step: StepName, kind: type[_Completion]) -> _Completion:
    path = context.workspace.completion(step)
    record = read_completion(path, kind)
    if record is None:
        raise bad_configuration(f"{path} is missing: run the {step} step first, in this workspace")
    return record


def _destination(context: StepContext, address: str | None, folder: Path) -> Destination:
    """The destination of an address of spec.output; without one, `folder` of the workspace."""
    if address is not None:
        return open_destination(
            address,
            mounts=context.mounts,
            secret=context.secret("output"),
            registries=context.registries,
            owner=context.pod_uid,
        )
    root = context.workspace.root
    uri = f"{context.workspace_uri}/{folder.relative_to(root)}"
    return VolumeFolder(confined(folder, root), uri, owner=context.pod_uid)


def _merged_destination(context: StepContext) -> Destination | None:
    """The destination of the merged model; None if the job does not ask for one."""
    wanted = context.spec.output.merged
    return None if wanted is None else _destination(context, wanted.destination, context.workspace.merged)


def _already_published(context: StepContext, trained: TrainRecord, destination: Destination) -> PublishRecord | None:
    """The completion record, if it is of this adapter and every file is still what its manifest says."""
    record = read_completion(context.workspace.completion("publish"), PublishRecord)
    if record is None or record.fingerprint != _fingerprint(trained, destination):
        return None
    merged_destination = _merged_destination(context)
    if merged_destination is not None and not still_published(merged_destination, record.merged):
        return None
    manifest = destination.published()
    if manifest is None or ADAPTER_FILE not in manifest.files:
        return None
    same = manifest.files[ADAPTER_FILE].sha256 == trained.adapter_sha256
    return record if same and is_published(destination, manifest) else None


def _fingerprint(trained: TrainRecord, destination: Destination) -> str:
    parts = [trained.fingerprint, trained.adapter_sha256, destination.uri]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _verified(context: StepContext, prepared: PrepareRecord, trained: TrainRecord) -> Path:
    """The folder of the trained adapter, after every check. Raises StepFailure."""
    root = context.workspace.root
    folder = confined(root / trained.adapter_path, root)
    verify_adapter(
        folder,
        trained.adapter_sha256,
        context.spec.lora,
        model_folder=root / prepared.model_path,
        target_modules=prepared.target_modules,
        base_name=context.base_name,
        base_revision=prepared.model_revision,
    )
    return folder


def _manifest(context: StepContext, prepared: PrepareRecord, trained: TrainRecord, contents: Contents) -> Manifest:
    spec = context.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(MUTABLE_FIELDS))
    return Manifest(
        job_uid=context.job_uid,
        job_name=context.document.metadata.name,
        fingerprint=trained.fingerprint,
        spec_sha256=hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        base_model=context.spec.model.source,
        base_revision=prepared.model_revision,
        libraries={name: version(name) for name in _LIBRARIES},
        files=describe_files(contents),
    )
