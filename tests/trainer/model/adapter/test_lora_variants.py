"""Every variant of LoRA trains, resumes exactly, passes publish and loads in plain PEFT."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.spec.resolved import ResolvedLora
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, write_completion
from qlora_trainer.core.context import StepContext, base_name
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.initial import get_initial_adapter
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.losses.batch import read_batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.publishing.verify import verify_adapter
from qlora_trainer.report.serving import rejected_by_vllm, served_rank
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub
from tests.support.models.sequences import CPU
from tests.support.resolved import resolved_lora, resolved_spec
from tests.support.training import StopAtStep, adapter_bytes, history, prepared, run

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"useRslora": True},
    "dora": {"useDora": True},
    "dora-16bit": {"useDora": True, "dtype": "bfloat16"},
    "one-block": {"layersToTransform": [1]},
    "whole-modules": {"modulesToSave": ["lm_head", "embed_tokens"]},
}


@pytest.fixture(scope="session", params=VARIANTS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> tuple[StepContext, TrainRecord, Path]:
    """Train a variant once. Do not change its files: copy them."""
    spec = {"lora": VARIANTS[request.param]}
    context = prepared(tmp_path_factory.mktemp(request.param) / "workspace", tiny_llama, spec)
    return context, run(context), tiny_llama


def check(context: StepContext, record: TrainRecord, model: Path) -> None:
    """The checks of the publish step."""
    lora = resolved_spec(context.spec).lora
    verify_adapter(
        context.workspace.trained,
        record.adapter_sha256,
        lora,
        model_folder=model,
        target_modules=inspect_family(model, lora).target_modules,
        base_name=base_name(context.spec.model),
        base_revision="sha256:tiny",
    )


def test_a_variant_lowers_the_loss_and_resumes_bit_identically(
    trained: tuple[StepContext, TrainRecord, Path], tmp_path: Path
) -> None:
    context, record, model = trained
    interrupted = prepared(tmp_path / "workspace", model, {"lora": context.spec.lora.dump()})
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(interrupted, stop=stop, records=StopAtStep(3, stop))
    run(interrupted)

    assert record.eval_loss is not None
    assert record.initial_eval_loss is not None
    assert record.eval_loss < record.initial_eval_loss
    assert adapter_bytes(interrupted) == adapter_bytes(context)
    assert history(interrupted) == history(context)


def test_plain_peft_computes_the_same_loss(trained: tuple[StepContext, TrainRecord, Path]) -> None:
    context, record, model = trained
    base = load_base(model, QuantizationSpec(), "cpu")
    # PEFT widens 16-bit adapters by default.
    widen = context.spec.lora.dtype == "float32"
    # Trainable, since the loss of a head that is trained is added up in another order.
    adapter = str(context.workspace.trained)
    loaded = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=widen).eval()

    data = PreparedDataset.open(context.workspace.data / "rows", "eval")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        batches = [read_batch(data, (index,), CPU) for index in range(len(data))]
        summed = sum(batch_loss(loaded.get_base_model(), batch).double() for batch in batches)
    assert float(summed) / sum(batch.target_count for batch in batches) == record.eval_loss


@pytest.mark.slow
def test_a_variant_continues_from_the_loss_that_it_ended_with(
    trained: tuple[StepContext, TrainRecord, Path], tmp_path: Path
) -> None:
    first, record, model = trained
    lora = {**first.spec.lora.dump(), "from": {"source": "pvc://adapters/trained"}}
    context = prepared(tmp_path / "workspace", model, {"lora": lora, "training": {"maxSteps": 1}})
    mounts = dataclasses.replace(context.mounts, claims={"adapters": first.workspace.root})
    context = dataclasses.replace(context, mounts=mounts)
    path = context.workspace.completion("prepare")
    done = PrepareRecord.model_validate_json(path.read_bytes())
    access, folder = StoreAccess(mounts, lambda: Hub(None), context.secret("lora")), context.workspace.initial_adapter
    initial = get_initial_adapter(context.spec.lora, access, folder, model, done.target_modules)
    assert initial is not None
    initial.complete()
    write_completion(path, done.model_copy(update={"initial_adapter": initial.status}))
    assert run(context).initial_eval_loss == record.eval_loss


def test_the_check_before_publication_covers_every_tensor(
    trained: tuple[StepContext, TrainRecord, Path], tmp_path: Path
) -> None:
    context, record, model = trained
    check(context, record, model)
    tensors = load_file(context.workspace.trained / "adapter_model.safetensors")
    copy = dataclasses.replace(context, workspace=WorkspaceLayout(tmp_path))
    shutil.copytree(context.workspace.trained, copy.workspace.trained)
    file = copy.workspace.trained / "adapter_model.safetensors"
    kinds = {name.removesuffix(".weight").rpartition(".")[2]: name for name in tensors}
    for name in kinds.values():
        others = {other: tensor for other, tensor in tensors.items() if other != name}
        for changed in ({}, {name: tensors[name][1:].contiguous()}, {name: tensors[name].half()}):
            save_file(others | changed, file)
            with pytest.raises(StepFailure) as caught:
                check(copy, record.model_copy(update={"adapter_sha256": file_sha256(file)}), model)
            assert caught.value.exit_code is ExitCode.INTERNAL_ERROR
            assert name in caught.value.message


def test_blocks_are_chosen_by_number_and_must_exist(tiny_llama: Path) -> None:
    chosen = inspect_family(tiny_llama, resolved_lora(layers_to_transform=(1,))).target_modules
    assert len(chosen) == 7
    assert all(".layers.1." in name for name in chosen)
    with pytest.raises(StepFailure, match=r"names block 2, .* numbered 0 to 1") as caught:
        inspect_family(tiny_llama, resolved_lora(layers_to_transform=(0, 2)))
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_tied_modules_are_not_trained_apart(tiny_qwen2: Path) -> None:
    with pytest.raises(StepFailure, match="embed_tokens and lm_head are one matrix") as caught:
        inspect_family(tiny_qwen2, resolved_lora(modules_to_save=("lm_head",)))
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


@pytest.mark.parametrize(
    ("lora", "word"),
    [
        (resolved_lora(), None),
        (resolved_lora(use_rslora=True, layers_to_transform=(1,)), None),
        (resolved_lora(rank=512), None),
        (resolved_lora(use_dora=True), "DoRA"),
        (resolved_lora(modules_to_save=("lm_head",)), "modulesToSave"),
        (resolved_lora(rank=1024), "rank 1024"),
    ],
)
def test_settings_that_vllm_rejects_are_named_with_the_reason(lora: ResolvedLora, word: str | None) -> None:
    reason = rejected_by_vllm(lora)
    assert (reason is None) == (word is None)
    assert reason is None or str(word) in reason
    assert (served_rank(lora) is None) == (word is not None)


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (48, 64), (64, 64), (257, 320), (321, 512)])
def test_the_rank_that_a_server_must_allow_is_one_that_vllm_accepts(rank: int, served: int) -> None:
    assert served_rank(resolved_lora(rank=rank)) == served
