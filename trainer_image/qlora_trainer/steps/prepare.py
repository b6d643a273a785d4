"""The step `prepare`: model and data, found, checked and laid out in the workspace.

What is cheap and may be wrong comes first: the model's configuration, whether it fits the card, the data. The weights
come last. What is not complete is in folders named `.NAME.partial`, from which the next attempt resumes.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from qlora_api.contract import WorkspaceLayout
from qlora_api.memory.model_shape import ModelShape
from qlora_api.status import MemoryStatus
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.completion import PrepareRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import (
    complete_folder,
    file_sha256,
    is_full,
    new_folder,
    partial_path,
    remove_partials,
    sizes,
    write_atomically,
)
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.build import Dataset, libraries, read_dataset, same_data
from qlora_trainer.data.chat_template import Tokenizer
from qlora_trainer.data.prepared import FORMAT_VERSION, PREPARED_MANIFEST
from qlora_trainer.model.downloads import open_model_source
from qlora_trainer.model.memory_fit import memory_status, read_shape, require_fit, training_shape
from qlora_trainer.model.source import CONFIG, TOKENIZER_FILES, DownloadedModel, refuse_code
from qlora_trainer.model.support import Family, inspect_family
from qlora_trainer.publishing.addresses import check_destination, published_addresses
from qlora_trainer.report.serving import refused_by_vllm
from qlora_trainer.report.trackers import require_installed
from qlora_trainer.stores.hub import Hub, hub_token

logger = logging.getLogger(__name__)
_LARGE_MODEL_PARAMETERS = 13_500_000_000
_LARGE_MODEL_LEARNING_RATE = 1e-4


def prepare(
    context: StepContext, records: RecordWriter, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> PrepareRecord:
    """Lay out model and data in the workspace and write the completion record; returns at once if it still holds.

    Raises StepFailure. After a failure that another attempt cannot mend, nothing is left in the workspace that was not
    there before; after any other, what has been downloaded and tokenized stays and the next attempt goes on from it.
    """

    def say(activity: str) -> None:
        records.progress(context.progress("prepare", now(), activity))

    path = context.workspace.completion("prepare")
    written = read_completion(path, PrepareRecord)
    record = None if written is None else _still_valid(written, context, records)
    if record is None:
        try:
            record = _prepare(context, records, say)
        except StepFailure as failure:
            if failure.exit_code.permanent:
                _discard_partial(context.workspace.models)
                _discard_partial(context.workspace.data)
            raise
        except OSError as error:
            if is_full(error):
                _discard_partial(context.workspace.data)
            raise
        _discard_partial(context.workspace.data)
    if record != written:
        write_completion(path, record)
    records.note(model_revision=record.model_revision, memory=record.memory, dataset=record.dataset)
    return record


@dataclass(frozen=True)
class _Checked:
    """What the model's configuration says, once it is known that training can start."""

    shape: ModelShape
    family: Family
    memory: MemoryStatus


def _prepare(context: StepContext, records: RecordWriter, say: Callable[[str], None]) -> PrepareRecord:
    spec, workspace = context.spec, context.workspace
    hub = cache(lambda: Hub(_token(context)))
    for address in published_addresses(spec):
        check_destination(address, mounts=context.mounts, registries=context.registries, job_uid=context.job_uid)
    say("reading the model's configuration")
    model = open_model_source(context, hub)
    if isinstance(model, DownloadedModel):
        # Of another version, from before a branch moved on: nobody will finish it, and it fills the volume.
        _discard_partial(workspace.models, but=model.folder)
    folder = model.settings()
    checked = _check_model(folder, spec, records)
    tokenizer = Tokenizer(folder)
    model.check_weights()

    dataset = read_dataset(
        context,
        hub,
        tokenizer,
        vocabulary=checked.shape.vocab_size,
        tokenizer_files=_tokenizer_digests(folder),
        scratch=lambda name: partial_path(workspace.data / name),
        say=say,
    )
    records.note(dataset=dataset.status())
    packed = spec.training.packing and checked.family.keeps_rows_apart(spec.training.max_sequence_length)
    layout = new_folder(partial_path(workspace.data / "layout"))
    dataset.write(layout, spec.training, packed=packed)

    verb = "downloading" if isinstance(model, DownloadedModel) else "reading"
    revision = model.weights(lambda done, total: say(f"{verb} model {sizes(done, total)}"))
    resolved = _resolved(revision, folder, dataset)
    data = _publish_data(layout, workspace.data, resolved, spec)
    if isinstance(model, DownloadedModel):
        folder = _publish_model(folder, workspace.models / model.version)
    return PrepareRecord(
        fingerprint=data.name,
        model_path=_stored(folder, workspace),
        model_revision=revision,
        data_path=_stored(data, workspace),
        target_modules=checked.family.target_modules,
        packed=packed,
        model_type=checked.family.model_type,
        memory=checked.memory,
        dataset=dataset.status(),
    )


def _token(context: StepContext) -> str | None:
    reference = context.spec.model.token_secret_ref
    secret = None if reference is None else f"Secret {reference.name!r} with key {reference.key!r}"
    return hub_token(context.mounts.token_file, secret)


def _check_model(folder: Path, spec: QLoRAJobSpec, records: RecordWriter) -> _Checked:
    require_installed(spec.training.report_to)
    refuse_code(folder)
    family = inspect_family(folder, spec.lora)
    family.require_positions(spec.training.max_sequence_length)
    if spec.training.packing and not family.keeps_rows_apart(spec.training.max_sequence_length):
        logger.warning("no packing: rows in one sequence would affect each other in this %s model", family.model_type)
    refused = refused_by_vllm(spec.lora)
    if refused is not None and spec.output.merged is None:
        logger.warning("vLLM will not serve the adapter: %s; spec.output.merged makes a model that it serves", refused)
    shape = read_shape(folder / CONFIG)
    _advise_learning_rate(shape, spec.training.learning_rate)
    return _Checked(shape, family, _check_memory(shape, family.target_modules, spec, records))


def _advise_learning_rate(shape: ModelShape, learning_rate: float) -> None:
    parameters = shape.linear_parameters + shape.embedding_parameters
    if parameters > _LARGE_MODEL_PARAMETERS and learning_rate > _LARGE_MODEL_LEARNING_RATE:
        logger.warning("spec.training.learningRate is %g; 1e-4 is advised above 13B parameters", learning_rate)


def _check_memory(
    shape: ModelShape, target_modules: tuple[str, ...], spec: QLoRAJobSpec, records: RecordWriter
) -> MemoryStatus:
    training, card = training_shape(spec, target_modules), spec.resources.gpu_memory
    memory = memory_status(shape, training, card)
    records.note(memory=memory)
    require_fit(memory, shape, training, card)
    return memory


def _resolved(revision: str, folder: Path, dataset: Dataset) -> dict[str, Any]:
    """What the addresses of the job turned out to be; with the spec it determines the prepared data."""
    return {
        "model": revision,
        "tokenizer": _tokenizer_digests(folder),
        "data": dataset.training.sha256,
        "evalData": dataset.evaluation_sha256,
    }


def _tokenizer_digests(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in sorted(TOKENIZER_FILES) if (folder / name).is_file()}


def _fingerprint(resolved: Any, spec: QLoRAJobSpec) -> str:
    training = spec.training
    inputs = {
        "format": FORMAT_VERSION,
        "libraries": libraries(),
        "trainer": trainer_version(),
        "resolved": resolved,
        "model": {"source": spec.model.source, "revision": spec.model.revision},
        "targetModules": spec.lora.target_modules,
        "layersToTransform": spec.lora.layers_to_transform,
        "dataset": spec.dataset.dump(),
        "maxSequenceLength": training.max_sequence_length,
        "packing": training.packing,
        "trainOn": training.train_on,
        # It chooses rows, and which of them share a sequence.
        "seed": training.seed,
    }
    return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _publish_data(layout: Path, folder: Path, resolved: dict[str, Any], spec: QLoRAJobSpec) -> Path:
    """Write the manifest and give the folder its final name."""
    fingerprint = _fingerprint(resolved, spec)
    manifest = {"fingerprint": fingerprint, "resolved": resolved}
    write_atomically(layout / PREPARED_MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
    target = folder / fingerprint
    complete_folder(layout, target)
    return target


def _publish_model(folder: Path, target: Path) -> Path:
    """Give a downloaded model's folder its final name, unless an earlier attempt has."""
    if folder != target:
        complete_folder(folder, target)
    return target


def _still_valid(record: PrepareRecord, context: StepContext, records: RecordWriter) -> PrepareRecord | None:
    """The record with a new estimate, if what it describes is there and is what the job asks for; else None."""
    root = context.workspace.root
    try:
        resolved = json.loads((root / record.data_path / PREPARED_MANIFEST).read_bytes())["resolved"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    model = root / record.model_path
    config = model / CONFIG
    if _fingerprint(resolved, context.spec) != record.fingerprint or not config.is_file():
        return None
    if _tokenizer_digests(model) != resolved["tokenizer"] or not same_data(resolved, context):
        return None
    memory = _check_memory(read_shape(config), record.target_modules, context.spec, records)
    return record.model_copy(update={"memory": memory})


def _stored(path: Path, workspace: WorkspaceLayout) -> str:
    """A path as a record holds it: relative to the workspace where it lies inside."""
    return str(path.relative_to(workspace.root) if path.is_relative_to(workspace.root) else path.absolute())


def _discard_partial(folder: Path, *, but: Path | None = None) -> None:
    """Delete what is incomplete in the folder, except `but`, and then the folder itself if nothing else is in it."""
    remove_partials(folder, but=but)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
