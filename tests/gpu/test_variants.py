"""Options of a job on a GPU: LoRA variants, 8-bit optimizer, other families, a merge."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.evaluation.held_out import mean_loss, read_compared
from qlora_trainer.model.base.load import load_base
from tests.gpu.runs import losses, on_gpu, record
from tests.support.commands.command import Files, new_files
from tests.support.families import tiny_config
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.tiny import save_model

MXFP4 = "gpt_oss in MXFP4"
FAMILIES = ("qwen3", "gemma2", "gemma3_text", "gemma4_text", "qwen3_moe", "mixtral", "gpt_oss", MXFP4, "bamba", "bloom")
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"useRslora": True},
    "dora": {"useDora": True},
}


def loss_in_peft(files: Files, model: Path) -> float:
    """Return the published adapter's held-out loss, read by PEFT itself onto the GPU."""
    base = load_base(model, QuantizationSpec(), "cuda")
    adapted = PeftModel.from_pretrained(base, str(files.workspace / "adapter")).eval()
    data = PreparedDataset.open(files.workspace / record(files, "prepare")["dataPath"], "eval")
    batches = read_compared(data, len(data), torch.device("cuda"), together=False)
    return float(mean_loss(adapted.get_base_model(), batches))


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_a_published_lora_variant_has_the_same_loss_in_peft(
    lora: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    spec = {"lora": lora, "training": {"maxSteps": 2}}
    files = on_gpu(new_files(tmp_path / "job", tiny_llama.parent, spec), "prepare", "train", "publish")
    trained = record(files, "train")
    assert trained["evalLoss"] < trained["initialEvalLoss"]
    assert loss_in_peft(files, tiny_llama) == pytest.approx(trained["evalLoss"], rel=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_family_trains_close_to_the_same_on_a_cpu(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "model"
    models = (save_gpt_oss(folder) if family == MXFP4 else save_model(folder, tiny_config(family))).parent
    prepared = on_gpu(new_files(tmp_path / "prepared", models), "prepare")
    here, there = (prepared.copied(tmp_path / name) for name in ("here", "there"))
    on_gpu(here, "train")
    assert there.run("train", QLORA_DEVICE="cpu").exit_code == 0
    # As for the Llama in test_training.py: ten times the effect of another type on a CPU.
    assert losses(here) == pytest.approx(losses(there), rel=1e-2)


def test_an_adapter_that_a_gpu_trained_is_merged_into_the_weights_of_that_gpu(tmp_path: Path, tiny_llama: Path) -> None:
    spec: dict[str, Any] = {"output": {"merged": {}}}
    files = on_gpu(new_files(tmp_path / "job", tiny_llama.parent, spec), "prepare", "train", "publish")
    merged = record(files, "publish")["merged"]
    assert merged["adapterEvalLoss"] < 0.9 * record(files, "train")["initialEvalLoss"]
    # The merged model is tried on the CPU, the adapter was on the GPU.
    assert merged["evalLoss"] == pytest.approx(merged["adapterEvalLoss"], rel=2e-2)


@pytest.mark.gpu(gib=10)
def test_paged_8_bit_state_trains_nearly_as_32_bit_state_and_is_resumed(tmp_path: Path, billion: Files) -> None:
    training = {"learningRate": 1e-3, "saveEverySteps": 2}
    wide, narrow = (
        on_gpu(billion.copied(tmp_path / name).with_spec({"training": {**training, "optimizer": name}}), "train")
        for name in ("paged_adamw_32bit", "paged_adamw_8bit")
    )
    uninterrupted = losses(narrow)
    assert uninterrupted[-1] < uninterrupted[0]
    assert uninterrupted == pytest.approx(losses(wide), rel=5e-2)
    last = narrow.workspace / "checkpoints" / "step-4"
    state = load_file(last / "optimizer.safetensors")
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("/state1")} == {torch.uint8}

    (narrow.workspace / "records" / "train.json").unlink()
    shutil.rmtree(last)
    on_gpu(narrow, "train")
    assert losses(narrow) == pytest.approx(uninterrupted, rel=1e-2)
