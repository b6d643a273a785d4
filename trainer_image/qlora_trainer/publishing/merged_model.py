"""Merges the adapter into the base, evaluates the merged model and publishes it, for a job with output.merged.

The adapter is published before, so that a merge without enough room costs nothing but itself.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from qlora_api.artifact_status import MergedStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_trainer.core.completion import Comparison, EndOfTurn, PrepareRecord
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.failures import StepFailure, unsafe_artifact
from qlora_trainer.core.file_names import ADAPTER_FILE, MODEL_CARD_FILE, PROCESSOR_FILES, TOKENIZER_FILES
from qlora_trainer.core.filesystem import file_sha256, require_space, scratch_folder
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.data.prepared import PreparedDataset, open_prepared
from qlora_trainer.data.render.template_source import PROCESSOR_TEMPLATE, TEMPLATE_FILE
from qlora_trainer.evaluation.held_out import mean_loss, read_compared
from qlora_trainer.model.adapter.merge import MergeSource
from qlora_trainer.model.architecture.dequantized_model import (
    bytes_to_write,
    load_written,
    model_without_weights,
    write_model,
)
from qlora_trainer.model.architecture.widening import compute_in_float32
from qlora_trainer.model.base.artifact import require_sha256
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.nf4.computation import COMPUTE_DTYPES
from qlora_trainer.model.source.files import GENERATION_CONFIG
from qlora_trainer.publishing.manifest import run_manifest
from qlora_trainer.report.model_card import merged_model_card
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.destinations.destination import Destination, publish_folder, reject_occupied

_COPIED = (*sorted(TOKENIZER_FILES | PROCESSOR_FILES), GENERATION_CONFIG)


@dataclass(frozen=True)
class Merged:
    """A merged model in a folder of this machine."""

    contents: Contents
    weight_bytes: int
    loss: float | None
    """Loss on training's held-out rows for comparison, in nats, or None without any."""


def publish_merged(
    job: TrainedJob, workspace: WorkspaceLayout, destination: Destination, say: Callable[[str], None]
) -> MergedStatus:
    """Merge, evaluate and publish. `say` reports progress. Raises StepFailure."""
    reject_occupied(destination, run_manifest(job, {}).publisher)
    with scratch_folder(workspace.merged) as folder:
        say("merging the adapter into the base")
        merged = merge(job, workspace, folder)
        say(f"writing to {destination.uri}")
        manifest = run_manifest(job, merged.contents)
        uri = publish_folder(destination, merged.contents, manifest)
    compared = job.trained.compared
    return MergedStatus(
        uri=uri,
        sha256=hashlib.sha256(manifest.text()).hexdigest(),
        size_bytes=merged.weight_bytes,
        eval_loss=merged.loss,
        adapter_eval_loss=None if compared is None else compared.loss,
        eval_tokens=0 if compared is None else compared.targets,
    )


def is_merged_published(destination: Destination, status: MergedStatus | None) -> bool:
    """Whether an earlier attempt's merged model is at the destination, undamaged."""
    manifest = destination.read_manifest()
    return (
        status is not None
        and manifest is not None
        and hashlib.sha256(manifest.text()).hexdigest() == status.sha256
        and destination.find_damage(manifest) is None
    )


def merge(job: TrainedJob, workspace: WorkspaceLayout, folder: Path) -> Merged:
    """Merge the trained adapter into the base that it was trained on, write the model into `folder` and evaluate it.

    Raises StepFailure: STORAGE_FULL with the numbers if there is no room for it, UNSAFE_ARTIFACT if the base has
    changed since, INTERNAL_ERROR if the merged model does not load whole or its loss is not finite.
    """
    prepared, trained = job.prepared, job.trained
    model_folder = workspace.root / prepared.model_path
    model = model_without_weights(model_folder)
    # Without a separate destination it takes room twice: as it is written here, and as it is published next to that.
    copies = 1 if job.spec.output.merged and job.spec.output.merged.destination else 2
    require_space(workspace.root, copies * bytes_to_write(model), "writing the merged model in 16 bit")
    base_folder = workspace.root / prepared.base_path
    require_sha256(base_folder, trained.base_sha256)
    base = BaseWeights(base_folder, model)
    adapter = workspace.root / trained.adapter_path / ADAPTER_FILE
    written = write_model(model, MergeSource(base, adapter, job.spec.lora), folder)
    loss = None
    if trained.compared is not None:
        held_out = open_prepared(workspace.root / prepared.data_path, "eval")
        loss = _held_out_loss(
            folder,
            prepared.attention or ATTENTION,
            held_out,
            trained.compared,
            together=prepared.packed,
            compute_type=trained.compute_type,
        )
    for name in _COPIED:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)
    template = job_template_file(prepared, workspace)
    if template is not None:
        give_template(folder, template, prepared.end_of_turn)
    (folder / MODEL_CARD_FILE).write_text(merged_model_card(job, loss))
    return Merged({path.name: path for path in sorted(folder.iterdir())}, written, loss)


def job_template_file(prepared: PrepareRecord, workspace: WorkspaceLayout) -> Path | None:
    """The file of the chat template that the rows were written with, or None for the model's.

    Raises StepFailure UNSAFE_ARTIFACT if it is not what prepare has written.
    """
    if prepared.template_sha256 is None:
        return None
    path = workspace.root / prepared.data_path / TEMPLATE_FILE
    if path.is_symlink() or not path.is_file() or file_sha256(path) != prepared.template_sha256:
        raise unsafe_artifact(
            f"{path} is not the chat template that the rows were prepared with (SHA-256 {prepared.template_sha256}): "
            "it was changed or removed afterwards and nothing is published; create the job again"
        )
    return path


def give_template(folder: Path, template: Path, end: EndOfTurn | None) -> None:
    """Replace the chat template in a model's folder, and make servers stop at its end."""
    (folder / TEMPLATE_FILE).write_bytes(template.read_bytes())
    (folder / PROCESSOR_TEMPLATE).unlink(missing_ok=True)
    if end is None or end.token is None:
        return
    path = folder / GENERATION_CONFIG
    settings: JsonObject = json.loads(path.read_bytes()) if path.is_file() else {}
    settings["eos_token_id"] = [*end.known, end.token]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _held_out_loss(
    folder: Path,
    attention: str,
    held_out: PreparedDataset,
    compared: Comparison,
    *,
    together: bool,
    compute_type: ComputeType,
) -> float:
    """Loss of the written files, in nats. Weights are mapped, not in memory, and read once per batch.

    `attention` and `compute_type` are those that the adapter was trained with. `together` puts all sequences into one
    batch, for a model that keeps rows apart. Raises StepFailure INTERNAL_ERROR if the loss is not finite, or if the
    files lack a tensor of the model or have another one.
    """
    register_attention()
    model = load_written(folder, attention)
    if compute_type == "float32":
        compute_in_float32(model)
    batches = read_compared(held_out, compared.sequences, torch.device("cpu"), together=together)
    loss = mean_loss(model.eval(), batches, COMPUTE_DTYPES[compute_type])
    if not isfinite(loss):
        raise StepFailure(
            ExitCode.INTERNAL_ERROR,
            f"the merged model's loss on the held-out rows is {loss}, the adapter's {compared.loss:.4f}: the merged "
            "model is not published; the adapter is",
        )
    return loss
