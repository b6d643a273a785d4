"""Publishes the 4-bit base that an adapter was trained on, for a job with output.base."""

from qlora_api.contract import WorkspaceLayout
from qlora_api.status import BaseStatus
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.file_names import MODEL_CARD_FILE
from qlora_trainer.model.base_artifact import require_files, require_sum
from qlora_trainer.model.source import PROCESSOR_FILES, TOKENIZER_FILES
from qlora_trainer.publishing.destination import Destination, is_published, publish_folder
from qlora_trainer.publishing.manifest import SHARED_BASE, base_manifest
from qlora_trainer.report.model_card import base_model_card
from qlora_trainer.report.trained_job import TrainedJob
from qlora_trainer.stores.contents import Contents


def publish_base(job: TrainedJob, workspace: WorkspaceLayout, destination: Destination) -> BaseStatus:
    """Publish it with the tokenizer and a model card, unless another job has published the same there.

    Raises StepFailure: UNSAFE_ARTIFACT if the base has changed since training, and as `publish_folder` does.
    """
    if job.prepared.base is None:
        raise AssertionError("a release without the base's status knows no output.base")
    folder, model = workspace.root / job.prepared.base_path, workspace.root / job.prepared.model_path
    names = require_files(folder)
    contents: Contents = {
        **{name: folder / name for name in names},
        **{name: model / name for name in sorted(TOKENIZER_FILES | PROCESSOR_FILES) if (model / name).is_file()},
        MODEL_CARD_FILE: base_model_card(job).encode(),
    }
    manifest = base_manifest(job, contents)
    require_sum(folder, {name: manifest.files[name].sha256 for name in names}, job.trained.base_sha256)
    try:
        uri = publish_folder(destination, contents, manifest)
    except OSError:
        # Another job that publishes the same has been faster, and has removed what this one had begun.
        if not is_published(destination, manifest):
            raise
        uri = destination.location()
    return job.prepared.base.model_copy(update={"uri": uri})


def base_still_published(destination: Destination, trained: TrainRecord) -> bool:
    """Whether the base of that training is at the destination, undamaged."""
    manifest = destination.published()
    if manifest is None or (manifest.job_uid, manifest.fingerprint) != (SHARED_BASE, trained.base_sha256):
        return False
    return destination.damaged(manifest) is None
