"""The benchmark of automatic settings: its rows repeat, and each arm has the settings that its source publishes."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.defaults.arms import FIXED, Facts, Settings, automatic, by_hand
from benchmarks.defaults.summary import share, tables
from benchmarks.defaults.tasks import TASKS, Task, sets_of
from qlora_api.automatic import ModelFacts, RowFacts


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_rows_are_the_same_in_every_run_and_in_one_set_only(task: Task) -> None:
    again = sets_of.__wrapped__(task)

    assert again == sets_of(task)
    rows = [json.dumps(row) for part in (again.held_out, again.validation, again.train) for row in part]
    assert len(set(rows)) == len(rows) == task.held_out_rows + task.validation_rows + task.train_rows


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(4, 25, 1), (20, 5, 1), (33, 3, 1), (1000, 3, 2), (10_000, 2, 20), (200_000, 1, 256)]
)
def test_the_rule_of_openai_is_that_of_its_cookbook(rows: int, epochs: int, batch: int) -> None:
    found = FIXED["openai"](replace(TASKS["dates"], train_rows=rows))

    assert (found.epochs, found.batch, found.learning_rate) == (epochs, batch, 2e-4)


def test_the_settings_of_others_are_those_that_they_publish() -> None:
    task, pairs = TASKS["dates"], replace(TASKS["truth"], train_rows=160)

    assert FIXED["unsloth"](task) == Settings(
        3, 8, False, 2048, 2e-4, "linear", 5, 16, 16, weight_decay=0.001, max_grad_norm=1.0
    )
    assert FIXED["unsloth"](pairs) == Settings(3, 8, False, 4096, 5e-6, "linear", 6, 64, 64, max_grad_norm=1.0)
    of_trl = Settings(3, 8, False, 1024, 1e-4, "linear", 0, 16, 32, dropout=0.05, max_grad_norm=1.0)
    assert FIXED["trl"](task) == of_trl
    assert FIXED["trl"](pairs) == replace(of_trl, learning_rate=1e-5)
    assert FIXED["former"](task) == Settings(1, 16, True, 512, 2e-4, "constant", 0, 64, 16)


def test_the_automatic_arm_has_the_settings_of_a_job_that_sets_none() -> None:
    def count(length: int, held_out: int) -> RowFacts:
        return RowFacts(rows=128 - held_out, sequences=12, loss_tokens=900, held_out=held_out > 0)

    found, choices = automatic(TASKS["dates"], Facts([13] * 128, count, ModelFacts(576, 305_280)))

    assert found.held_out_rows == 13
    assert (found.packed, found.length) == (True, 128)
    chosen = {choice.setting: choice.parsed for choice in choices}
    assert (found.epochs, found.learning_rate) == (chosen["training.epochs"], chosen["training.learningRate"])
    assert found.training(TASKS["truth"]).objective == "dpo"


def test_the_tuner_by_hand_ends_at_the_best_rate_and_epochs_nearby() -> None:
    task, tried = TASKS["dates"], dict[Settings, float]()

    def loss(found: Settings) -> float:
        return abs(found.learning_rate / task.start.learning_rate - 4) + abs(found.epochs / task.start.epochs - 2)

    while (following := by_hand(task, lambda epochs, batch: 20 * epochs // batch, tried)) is not None:
        assert following not in tried
        tried[following] = loss(following)

    best = min(tried, key=tried.__getitem__)
    assert (best.learning_rate, best.epochs) == (task.start.learning_rate * 4, task.start.epochs * 2)
    assert len(tried) < 12


def cell(arm: str, loss: float, score: float, validation: float = 1.0) -> dict[str, Any]:
    """An entry of the results."""
    held_out = {"loss": loss, "score": score}
    entry = {"task": "dates", "arm": arm, "steps": 1, "processorSeconds": 60.0}
    return entry | {"heldOut": held_out, "validation": {"loss": validation}}


def test_shares_compare_with_the_run_that_the_validation_rows_choose() -> None:
    cells = [
        cell("base", 5.0, 0.0),
        cell("hand-tuned", 1.0, 0.8, validation=1.2),
        cell("hand-tuned", 0.5, 0.9, validation=1.3),
        cell("automatic", 2.0, 0.6),
    ]

    found = share(cells, "dates", "automatic")

    assert found is not None
    assert (found.drop, found.score) == (pytest.approx(0.75), pytest.approx(0.75))
    assert share(cells, "truth", "automatic") is None
    assert "average ≥ 95 % | 75 %: **missed** | 75 %: **missed** |" in tables(
        {"cells": cells, "machine": {"processor": "Xeon", "instructions": ["avx2"]}}
    )
