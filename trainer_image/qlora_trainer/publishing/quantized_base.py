"""Publishes the 4-bit base that an adapter was trained on, for output.base."""

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import WorkspaceLayout
from qlora_api.schema import replace
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.file_names import MODEL_CARD_FILE
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.model.base.artifact import require_files, require_sum
from qlora_trainer.model.source.files import tokenizer_and_processor
from qlora_trainer.publishing.manifest import base_manifest, base_publisher
from qlora_trainer.report.model_card import base_model_card
from qlora_trainer.stores.contents import Contents, Manifest, Publisher
from qlora_trainer.stores.destinations.destination import Destination, reject_occupied


def publish_base(job: TrainedJob, workspace: WorkspaceLayout, destination: Destination) -> BaseStatus:
    """Publish it with the tokenizer and a model card, unless another job has published both there.

    Raises StepFailure: UNSAFE_ARTIFACT if the base has changed since training, BAD_CONFIGURATION if the destination has
    anything else, the base with another tokenizer included.
    """
    if job.prepared.base is None:
        raise AssertionError("a release without the base's status has no output.base")
    folder, model = workspace.root / job.prepared.base_path, workspace.root / job.prepared.model_path
    names = require_files(folder)
    contents: Contents = {
        **{name: folder / name for name in names},
        **tokenizer_and_processor(model),
        MODEL_CARD_FILE: base_model_card(job).encode(),
    }
    manifest = base_manifest(job, contents)
    require_sum(folder, {name: manifest.files[name].sha256 for name in names}, job.trained.base_sha256)
    if not _is_there(destination, manifest, manifest.publisher):
        reject_occupied(destination, manifest.publisher)
        try:
            destination.write(contents, manifest)
        except (OSError, StepFailure):
            # Another job with the same base has been faster, and has removed or replaced what this one had begun.
            if not _is_there(destination, manifest, manifest.publisher):
                raise
    # Another job's has another model card, and so another address.
    uri = destination.location(destination.read_manifest() or manifest)
    return replace(job.prepared.base, uri=uri)


def is_base_published(job: TrainedJob, workspace: WorkspaceLayout, destination: Destination) -> bool:
    """Whether the trained base is at the destination with its tokenizer, undamaged."""
    publisher = base_publisher(job.trained.base_sha256, workspace.root / job.prepared.model_path)
    found = destination.read_manifest()
    return found is not None and _is_there(destination, found, publisher)


def _is_there(destination: Destination, manifest: Manifest, publisher: Publisher) -> bool:
    """Whether any job has published it there, with all files but the model card."""
    found = destination.read_manifest()
    if found is None or not publisher.owns(found):
        return False
    files = {name: file for name, file in manifest.files.items() if name != MODEL_CARD_FILE}
    return destination.find_damage(replace(manifest, files=files)) is None
