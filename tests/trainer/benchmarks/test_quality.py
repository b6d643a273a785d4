"""The studies of quality and of automatic settings train what the product trains."""

from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.quality import tasks
from benchmarks.quality.cell import Place, run_cell
from benchmarks.quality.results import Cell
from benchmarks.tuning.subjects import load_subject
from benchmarks.tuning.training import train
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_tensors
from tests.support.resolved import resolved_spec
from tests.support.training import prepared, run


def test_the_study_and_the_train_step_make_the_same_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    context = prepared(
        tmp_path / "work", tiny_llama, {"training": {"optimizer": "adamw", "gradientCheckpointing": False}}
    )
    run(context)
    job = resolved_spec(context.spec)

    subject = load_subject("nf4-dq", tiny_llama, tmp_path / "base", job.lora, job.training.seed)
    train(subject, PreparedDataset.open(context.workspace.data / "rows", "train"), job.training)

    found, expected = adapter_tensors(subject.model), load_file(context.workspace.trained / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_fine_tuning_learns_and_its_generated_answers_are_those_that_are_scored(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "HELD_OUT_ROWS", 20)
    monkeypatch.setattr(tasks, "VALIDATION_ROWS", 10)
    answers = cycle(("a", "a", "b"))
    task = tasks.Task("tiny", "say a, mostly", lambda _: (tasks.Row(f"{n}:", next(answers)) for n in range(200)), 150)
    monkeypatch.setitem(tasks.TASKS, task.name, task)
    place = Place(tiny_llama, tmp_path / "base")

    tuning, main = (run_cell(Cell(purpose, "tiny", "full", 1, 60, 1e-2), place) for purpose in ("tuning", "main"))

    assert tuning.train_losses[-1] < 0.7 * tuning.train_losses[0]
    assert tuning.earlier_loss is not None
    assert tuning.loss < 1.1 * tuning.earlier_loss
    assert (len(tuning.right), len(main.right), tuning.generated) == (10, 20, "")
    assert main.generated == main.right
    assert 0.0 < main.score < 1.0
