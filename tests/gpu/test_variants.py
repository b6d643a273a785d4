"""Options of a job on a GPU: LoRA variants, 8-bit optimizer, other families, objectives, long rows, a merge."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.evaluation.held_out import mean_loss, read_compared
from qlora_trainer.model.base.load import load_base
from tests.gpu.runs import losses, on_cpu, on_gpu, record
from tests.support.commands.command import Files, new_files
from tests.support.families import tiny_config
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.tiny import SHAPE, chat_row, save_model, write_rows

pytestmark = pytest.mark.image

MXFP4 = "gpt_oss in MXFP4"
DENSE = ("qwen3", "gemma2", "gemma3_text", "gemma4_text", "bloom")
# Packed rows in linear attention and short convolutions; Mamba's state has one row a sequence.
HYBRID = ("qwen3_5_text", "lfm2", "bamba")
FAMILIES = (*DENSE, *HYBRID, "qwen3_moe", "mixtral", "gpt_oss", MXFP4)
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
    there = on_cpu(prepared, tmp_path / "there")
    # As for the Llama in test_training.py: ten times the effect of another type on a CPU.
    assert losses(on_gpu(prepared, "train")) == pytest.approx(losses(there), rel=1e-2)


def test_preferences_are_trained_close_to_the_same_on_a_cpu(tmp_path: Path, tiny_llama: Path) -> None:
    spec = {"training": {"objective": "dpo", "maxSteps": 10}}
    files = new_files(tmp_path / "job", tiny_llama.parent, spec)
    pairs = [
        {"prompt": f"Pods of n{n}?", "chosen": f"kubectl get pods -n n{n}", "rejected": f"kubectl get nodes n{n}"}
        for n in range(40)
    ]
    write_rows(files.data / "train.jsonl", pairs)
    there = on_cpu(on_gpu(files, "prepare"), tmp_path / "there")
    assert losses(on_gpu(files, "train")) == pytest.approx(losses(there), rel=1e-2)
    assert losses(files)[-1] < losses(files)[0]


def test_modules_that_are_trained_in_full_have_the_losses_of_a_cpu(tmp_path: Path, tiny_llama: Path) -> None:
    spec = {"lora": {"modulesToSave": ["embed_tokens", "lm_head"]}, "training": {"maxSteps": 10}}
    files = on_gpu(new_files(tmp_path / "job", tiny_llama.parent, spec), "prepare")
    there = on_cpu(files, tmp_path / "there")
    assert losses(on_gpu(files, "train", "publish")) == pytest.approx(losses(there), rel=2e-2)
    assert loss_in_peft(files, tiny_llama) == pytest.approx(record(files, "train")["evalLoss"], rel=2e-3)


def test_dropout_is_the_same_in_a_repeated_run(tmp_path: Path, tiny_llama: Path) -> None:
    spec = {"lora": {"dropout": 0.3}, "training": {"maxSteps": 10}}
    files = on_gpu(new_files(tmp_path / "job", tiny_llama.parent, spec), "prepare")
    again = on_gpu(files.copied(tmp_path / "again"), "train")
    without = on_gpu(files.copied(tmp_path / "without").with_spec({"lora": {"dropout": 0.0}}), "prepare", "train")
    # A CPU draws other numbers. Without dropout the fourth loss is 0.5 % lower.
    assert losses(on_gpu(files, "train")) == pytest.approx(losses(again), rel=1e-3)
    assert losses(files) != pytest.approx(losses(without), rel=1e-3)


def test_packed_sequences_of_8192_tokens_have_the_losses_of_a_cpu(tmp_path: Path) -> None:
    config = LlamaConfig(**{**SHAPE, "max_position_embeddings": 8192})
    models = save_model(tmp_path / "models" / "model", config).parent
    spec = {"dataset": {"eval": None}, "training": {"maxSteps": 2, "maxSequenceLength": 8192, "evalEverySteps": None}}
    files = new_files(tmp_path / "job", models, spec)
    # From a few words to half a sequence.
    rows = [chat_row(f"Pods of n{n}?", f"kubectl get pods -n n{n} " * 2 ** (n % 9)) for n in range(60)]
    write_rows(files.data / "train.jsonl", rows)
    there = on_cpu(on_gpu(files, "prepare"), tmp_path / "there")
    # On a CPU, float32 instead of bfloat16 changes them by 3e-5.
    assert losses(on_gpu(files, "train")) == pytest.approx(losses(there), rel=1e-3)


def test_cells_that_share_a_pod_have_the_losses_of_jobs_alone(tmp_path: Path, tiny: Files) -> None:
    cells, alone = (
        [
            tiny.copied(tmp_path / name / str(rate)).with_spec({"training": {"learningRate": rate, "maxSteps": steps}})
            for rate, steps in ((0.005, 10), (0.002, 6))
        ]
        for name in ("cells", "alone")
    )
    first, second = cells
    on_gpu(replace(first, others=(second,)), "train")
    for cell, job in zip(cells, alone, strict=True):
        assert losses(cell) == pytest.approx(losses(on_gpu(job, "train")), rel=2e-2)


def test_answers_are_scored_as_on_a_cpu(tmp_path: Path, tiny_llama: Path) -> None:
    score = {"check": "regex", "pattern": "kubectl get pods", "rows": 5, "maxNewTokens": 12}
    files = on_gpu(new_files(tmp_path / "job", tiny_llama.parent, {"gate": {"score": score}}), "prepare")
    there = on_cpu(files, tmp_path / "there")
    here, expected = (record(each, "train")["score"] for each in (on_gpu(files, "train"), there))
    assert (here["rows"], here["base"], here["adapter"]) == (5, 0.0, expected["adapter"])
    assert here["adapter"] > 0


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
