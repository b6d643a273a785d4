"""The part of publish that a job with output.merged asks for: the merged model written, tried out and published.

It comes after the adapter is published, so that a merge for which there is no room costs nothing but itself.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.status import MergedStatus
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.file_names import ADAPTER_FILE, CARD_FILE
from qlora_trainer.core.filesystem import require_space, scratch_folder
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.attention import ATTENTION, register_attention
from qlora_trainer.model.base_weights import BaseWeights
from qlora_trainer.model.merge import MergeSource, merged_bytes, merged_model, write_merged
from qlora_trainer.model.quantized import QuantizedWeights, is_kept
from qlora_trainer.model.source import TOKENIZER_FILES
from qlora_trainer.publishing.destination import Destination, publish_folder, reject_occupied
from qlora_trainer.publishing.manifest import Manifest
from qlora_trainer.report.card import quantization_label
from qlora_trainer.stores.contents import Contents
from qlora_trainer.training.held_out import mean_loss, read_compared

_COPIED = (*sorted(TOKENIZER_FILES), "generation_config.json")


@dataclass(frozen=True)
class Merged:
    """A merged model that lies in a folder of this machine."""

    contents: Contents
    weight_bytes: int
    loss: float | None
    """On the held-out rows that training compared the adapter on; None if there are none."""


def publish_merged(
    context: StepContext,
    prepared: PrepareRecord,
    trained: TrainRecord,
    destination: Destination,
    describe: Callable[[Contents], Manifest],
    say: Callable[[str], None],
) -> MergedStatus:
    """Merge, evaluate and publish. `describe` makes the manifest of some files.

    Raises StepFailure as `merge` and `publish_folder` do. The folder of the workspace in which the model is merged is
    removed afterwards.
    """
    reject_occupied(destination, describe({}).same_run)
    with scratch_folder(context.workspace.merged) as folder:
        say("merging the adapter into the base")
        merged = merge(context, prepared, trained, folder)
        say(f"writing to {destination.uri}"[:128])
        manifest = describe(merged.contents)
        uri = publish_folder(destination, merged.contents, manifest)
    compared = trained.compared
    return MergedStatus(
        uri=uri,
        sha256=hashlib.sha256(manifest.text()).hexdigest(),
        size_bytes=merged.weight_bytes,
        eval_loss=merged.loss,
        adapter_eval_loss=None if compared is None else compared.loss,
        eval_tokens=0 if compared is None else compared.targets,
    )


def still_published(destination: Destination, status: MergedStatus | None) -> bool:
    """Whether the merged model that an earlier attempt has published is at the destination, undamaged."""
    manifest = destination.published()
    return (
        status is not None
        and manifest is not None
        and hashlib.sha256(manifest.text()).hexdigest() == status.sha256
        and destination.damaged(manifest) is None
    )


def merge(context: StepContext, prepared: PrepareRecord, trained: TrainRecord, folder: Path) -> Merged:
    """Merge the trained adapter into the base that it was trained on, write the model into `folder` and evaluate it.

    Raises StepFailure: STORAGE_FULL with the numbers if there is no room for it, UNSAFE_ARTIFACT if the 4-bit weights
    are not those of the training, INTERNAL_ERROR if the merged model computes no number.
    """
    workspace = context.workspace
    model_folder = workspace.root / prepared.model_path
    model = merged_model(model_folder)
    if not is_kept(workspace.quantized, trained.quantized_sha256):
        raise bad_configuration(
            f"{workspace.quantized}, the 4-bit weights that the adapter was trained on, is not there: create the job "
            "again, with spec.output.merged from its start"
        )
    copies = 1 if context.spec.output.merged and context.spec.output.merged.destination else 2
    require_space(workspace.root, copies * merged_bytes(model), "writing the merged model in 16 bit")
    quantized = QuantizedWeights(workspace.quantized)
    quantized.require_sha256(trained.quantized_sha256)
    adapter = workspace.root / trained.adapter_path / ADAPTER_FILE
    base = BaseWeights(model_folder, model)
    write_merged(model, MergeSource(base, quantized, adapter, context.spec.lora), folder)
    loss = _loss(context, prepared, trained, folder)
    for name in _COPIED:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, folder / name)
    (folder / CARD_FILE).write_text(card(context, prepared, trained, loss))
    contents = {path.name: path for path in sorted(folder.iterdir())}
    return Merged(contents, merged_bytes(model), loss)


def _loss(context: StepContext, prepared: PrepareRecord, trained: TrainRecord, folder: Path) -> float | None:
    """Loss of the written files. Weights are mapped, not held, and read once for each batch."""
    if trained.compared is None:
        return None
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation=ATTENTION,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
    data = PreparedDataset.open(context.workspace.root / prepared.data_path, "eval")
    cpu = torch.device("cpu")
    batches = read_compared(data, trained.compared.sequences, cpu, together=prepared.packed)
    loss = mean_loss(model, batches)
    if not isfinite(loss):
        raise StepFailure(
            ExitCode.INTERNAL_ERROR,
            f"the merged model's loss on the held-out rows is {loss}, the adapter's {trained.compared.loss:.4f}: it is "
            "not published; the adapter is",
        )
    return loss


def card(context: StepContext, prepared: PrepareRecord, trained: TrainRecord, loss: float | None) -> str:
    """What a person must know before the merged model is served, as Markdown."""
    spec, compared = context.spec, trained.compared
    comparison = "No rows were held out, so the merged model was not compared with the adapter."
    if compared is not None and loss is not None:
        comparison = (
            f"Loss on {compared.targets} held-out target tokens (nats): {loss:.4f} merged, {compared.loss:.4f} with "
            "the adapter on its 4-bit base."
        )
    bits = quantization_label(spec.quantization.type, double=spec.quantization.double_quant)
    return f"""# {context.document.metadata.name}, merged

The adapter of this job merged into `{context.base_name}` (`{prepared.model_revision}`), in bfloat16. It loads as any
model does, and needs no adapter beside it.

{comparison}

The base's weights are those that the adapter was trained on: {bits}, dequantized. They differ from
the original weights by the error of that quantization, which the adapter has learnt with.

Do not quantize this model to 4 bit again without measuring it: rounding can take away as much as the adapter has added.
To serve in 4 bit, load the original model in 4 bit and the adapter beside it.
"""
