"""The study of quality trains what the product trains, and scores all arms alike."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import cell as study
from benchmarks.quality.answers import answers
from benchmarks.quality.arms import MasterWeights, load_16_bit, load_subject, store_in_16_bit
from benchmarks.quality.data import prepare, without_chat_template
from benchmarks.quality.plan import ARMS, waiting_cells
from benchmarks.quality.tasks.task import Row
from benchmarks.quality.training import mean_loss, train
from qlora_api.training import LoraSpec, TrainingSpec
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_tensors
from tests.support.training import prepared, run

ROWS = [Row(f"pod {number}:", f" node {number % 3}") for number in range(24)]
TRAINING = TrainingSpec(
    epochs=2, gradient_accumulation_steps=1, max_sequence_length=64, gradient_checkpointing=False, optimizer="adamw"
)


def test_the_study_and_the_train_step_make_the_same_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(
        tmp_path / "work", tiny_llama, {"training": {"optimizer": "adamw", "gradientCheckpointing": False}}
    )
    run(context)
    job = context.spec

    subject = load_subject("nf4-dq", tiny_llama, tmp_path / "bases", job.lora, job.training.seed)
    train(subject, PreparedDataset.open(context.workspace.data / "rows", "train"), job.training)

    found, expected = adapter_tensors(subject.model), load_file(context.workspace.trained / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "arm", [arm if arm in ("full", "lora", "nf4-dq") else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_every_arm_learns_from_the_same_rows(tmp_path: Path, tiny_llama: Path, arm: str) -> None:
    model = without_chat_template(tiny_llama, tmp_path / "model")
    data = prepare(ROWS, model, TRAINING, tmp_path / "rows.safetensors")
    subject = load_subject(arm, model, tmp_path / "bases", LoraSpec(rank=4), seed=1)
    before = mean_loss(subject, data)
    subject.model.train()
    losses = train(subject, data, TRAINING.model_copy(update={"learning_rate": 1e-2}))
    assert losses[0] == pytest.approx(before, rel=0.1)
    assert mean_loss(subject, data) < 0.9 * before


def test_master_weights_keep_updates_that_16_bit_would_lose(tiny_llama: Path) -> None:
    subject = MasterWeights.of(load_16_bit(tiny_llama))
    weight, master = subject.weights[0], subject.parameters[0]
    before = weight.detach().clone()
    step = before.float().abs().max() * 2**-12
    for _ in range(2**8):
        weight.grad = torch.ones_like(weight)
        subject.collect_gradients()
        assert master.grad is not None
        master.data += step * master.grad
        subject.apply_update()
    assert torch.allclose(weight.float(), before.float() + 2**8 * step, rtol=0.01)


def test_a_base_in_4_bit_computes_the_same_once_it_is_stored_in_16_bit(tmp_path: Path, tiny_llama: Path) -> None:
    model = without_chat_template(tiny_llama, tmp_path / "model")
    network = load_subject("fp4-dq", model, tmp_path / "bases", LoraSpec(rank=4), seed=1).model.eval()
    tokens = torch.arange(3, 20).unsqueeze(0)
    network.get_base_model().set_attn_implementation("sdpa")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(tokens).logits
        store_in_16_bit(network)
        assert torch.equal(network(tokens).logits, before)


def test_an_answer_does_not_depend_on_what_else_is_in_its_batch(tmp_path: Path, tiny_llama: Path) -> None:
    model = without_chat_template(tiny_llama, tmp_path / "model")
    prompts = ["pod 1:", "List the pods of the namespace web and show their labels:", "node"]
    together = answers(load_16_bit(model), model, prompts, longest=6)
    assert together == [answers(load_16_bit(model), model, [prompt], longest=6)[0] for prompt in prompts]


def test_a_prompt_and_its_answer_are_one_text_of_which_the_answer_and_its_end_count(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model = without_chat_template(tiny_llama, tmp_path / "model")
    data = prepare(ROWS[:1], model, TRAINING, tmp_path / "rows.safetensors")
    tokens, labels = data[0].input_ids.tolist(), data[0].labels.tolist()
    trained = [token for token, label in zip(tokens, labels, strict=True) if label != -100]
    end = json.loads((model / "config.json").read_text())["eos_token_id"]
    assert tokens[-1] == trained[-1] == end
    assert 1 < len(trained) < len(tokens)


@pytest.mark.slow
def test_a_cell_gives_the_same_result_again(tmp_path: Path, tiny_llama: Path) -> None:
    place = study.Place(without_chat_template(tiny_llama, tmp_path / "model"), tmp_path / "bases")
    cell = next(cell for cell in waiting_cells([]) if cell.arm == "nf4-dq")
    first, second = (study.run_cell(cell, place) for _ in range(2))
    assert (first.right, first.loss, first.train_losses) == (second.right, second.loss, second.train_losses)
    assert first.train_losses[-1] < first.train_losses[0]
