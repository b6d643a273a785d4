"""Publishes the base that an adapter was trained on, for output.base: in 4-bit, or dequantized from that."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import WorkspaceLayout
from qlora_api.schema import replace
from qlora_api.spec.output import BaseType
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import MODEL_CARD_FILE
from qlora_trainer.core.filesystem import remove_partials, require_space, scratch_folder
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.model.architecture.dequantized_model import (
    DequantizedBase,
    bytes_to_write,
    load_written,
    model_without_weights,
    write_model,
)
from qlora_trainer.model.base.artifact import require_files, require_sha256, require_sum
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.source.files import GENERATION_CONFIG, tokenizer_and_processor
from qlora_trainer.publishing.manifest import base_manifest, base_publisher
from qlora_trainer.report.model_card import base_model_card
from qlora_trainer.stores.contents import Contents, Manifest, Publisher
from qlora_trainer.stores.destinations.destination import Destination, reject_occupied


def publish_base(
    job: TrainedJob, workspace: WorkspaceLayout, destination: Destination, base_type: BaseType
) -> BaseStatus:
    """Publish it with the tokenizer and a model card, unless another job has published the same there.

    Raises StepFailure: UNSAFE_ARTIFACT if the base has changed since training, STORAGE_FULL if there is no room to
    dequantize it, BAD_CONFIGURATION if the destination has anything else, the base with another tokenizer included.
    """
    if job.prepared.base is None:
        raise AssertionError("a release without the base's status has no output.base")
    # Of an attempt that was killed: a copy of the base in 16 bit.
    remove_partials(workspace.root)
    if base_type == "bfloat16" and (found := _find(job, workspace, destination, base_type)) is not None:
        return replace(job.prepared.base, uri=destination.location(found))
    folder, model = workspace.root / job.prepared.base_path, workspace.root / job.prepared.model_path
    with _weights(job, workspace, base_type) as weights:
        contents: Contents = {
            **weights,
            **tokenizer_and_processor(model),
            MODEL_CARD_FILE: base_model_card(job, base_type).encode(),
        }
        manifest = base_manifest(job, base_type, contents)
        if base_type == "quantized":
            require_sum(folder, {name: manifest.files[name].sha256 for name in weights}, job.trained.base_sha256)
        if not _is_there(destination, manifest, manifest.publisher):
            reject_occupied(destination, manifest.publisher)
            try:
                destination.write(contents, manifest)
            except (OSError, StepFailure):
                # Another job with the same base has been faster, and has removed or replaced what this one had begun.
                # In 16 bit another release of transformers writes another config.json.
                is_there = (
                    _is_there(destination, manifest, manifest.publisher)
                    if base_type == "quantized"
                    else is_base_published(job, workspace, destination, base_type)
                )
                if not is_there:
                    raise
    # Another job's has another model card, and so another address.
    uri = destination.location(destination.read_manifest() or manifest)
    return replace(job.prepared.base, uri=uri)


def is_base_published(
    job: TrainedJob, workspace: WorkspaceLayout, destination: Destination, base_type: BaseType
) -> bool:
    """Whether the trained base is at the destination with its tokenizer, undamaged."""
    return _find(job, workspace, destination, base_type) is not None


def _find(
    job: TrainedJob, workspace: WorkspaceLayout, destination: Destination, base_type: BaseType
) -> Manifest | None:
    """Return the manifest of the trained base at the destination, or None unless it exists, undamaged."""
    publisher = base_publisher(base_type, job.trained.base_sha256, workspace.root / job.prepared.model_path)
    found = destination.read_manifest()
    return found if found is not None and _is_there(destination, found, publisher) else None


@contextmanager
def _weights(job: TrainedJob, workspace: WorkspaceLayout, base_type: BaseType) -> Iterator[Mapping[str, Path]]:
    """Yield the files of weights and configuration, by name; dequantized, of a base with the sum of training."""
    folder, model_folder = workspace.root / job.prepared.base_path, workspace.root / job.prepared.model_path
    if base_type == "quantized":
        yield {name: folder / name for name in require_files(folder)}
        return
    require_sha256(folder, job.trained.base_sha256)
    model = model_without_weights(model_folder)
    require_space(workspace.root, bytes_to_write(model), "dequantizing the base to 16 bit")
    with scratch_folder(workspace.root / "dequantized") as written:
        write_model(model, DequantizedBase(BaseWeights(folder, model)), written)
        if (model_folder / GENERATION_CONFIG).is_file():
            shutil.copyfile(model_folder / GENERATION_CONFIG, written / GENERATION_CONFIG)
        register_attention()
        load_written(written, job.prepared.attention or ATTENTION)
        yield {path.name: path for path in sorted(written.iterdir())}


def _is_there(destination: Destination, manifest: Manifest, publisher: Publisher) -> bool:
    """Whether any job has published it there, with all files but the model card."""
    found = destination.read_manifest()
    if found is None or not publisher.owns(found):
        return False
    files = {name: file for name, file in manifest.files.items() if name != MODEL_CARD_FILE}
    return destination.find_damage(replace(manifest, files=files)) is None
