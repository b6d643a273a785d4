"""Which settings a job leaves to prepare, and the job with its choices."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.choice import Choice, sentence
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import HELD_OUT, decided_lora, fill, open_settings, resolve
from qlora_api.spec.training import LoraSpec
from tests.support.manifests import MINIMAL, merged
from tests.support.resolved import DECIDED

CHOICES = (
    Choice.of("lora.rank", 16, "few tokens"),
    Choice.of("lora.alpha", 32, ""),
    Choice.of("training.epochs", 3, ""),
    Choice.of("training.microBatchSize", 4, ""),
    Choice.of("training.gradientAccumulationSteps", 2, ""),
    Choice.of("training.learningRate", 0.0013, "for a width of 576"),
    Choice.of("training.scheduler", "linear", ""),
    Choice.of("training.warmupSteps", 7, ""),
    Choice.of("training.autoMicroBatch", True, ""),
    Choice.of("training.maxSequenceLength", 256, ""),
    Choice.of("training.packing", False, ""),
    Choice.of("training.gradientCheckpointing", False, "there is room for all activations"),
    Choice.of("training.evalEverySteps", 50, ""),
    Choice.of("training.keep", "best", ""),
    Choice.of(HELD_OUT, 0.1, ""),
)
ALL = {each.setting for each in CHOICES}


def job(**settings: Any) -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(merged(MINIMAL["spec"], settings))


@pytest.mark.parametrize(
    ("settings", "decided"),
    [
        ({}, set()),
        ({"lora": {"rank": 8}, "training": {"keep": "last"}}, {"lora.rank", "training.keep"}),
        ({"training": {"maxSteps": 10}}, {"training.epochs"}),
        (
            {"training": {"warmupSteps": 0, "autoMicroBatch": False}},
            {"training.warmupSteps", "training.autoMicroBatch"},
        ),
        ({"dataset": {"eval": {"fraction": 0}}}, {HELD_OUT}),
        ({"dataset": {"eval": {"source": "hf://org/other"}}}, {HELD_OUT}),
        (DECIDED, ALL),
    ],
    ids=["nothing", "two", "steps", "zeros", "no held-out rows", "other rows", "all"],
)
def test_what_a_job_does_not_set_is_open(settings: dict[str, Any], decided: set[str]) -> None:
    assert open_settings(job(**settings)) == ALL - decided


def test_all_that_is_open_gets_its_choice() -> None:
    found = resolve(job(), CHOICES)
    values = {
        **found.dump()["lora"],
        **found.dump()["training"],
        "eval.fraction": found.dump()["dataset"]["eval"]["fraction"],
    }
    assert {each.name: values[each.name] for each in CHOICES} == {each.name: each.parsed for each in CHOICES}
    assert open_settings(found) == frozenset()


def test_a_choice_never_overrides_what_the_job_sets() -> None:
    decided = job(**DECIDED)
    assert resolve(decided, CHOICES).dump() == decided.dump()
    zero = job(training={"warmupSteps": 0, "autoMicroBatch": False}, dataset={"eval": {"fraction": 0}})
    found = resolve(zero, [each for each in CHOICES if each.name != "keep"])
    assert (found.training.warmup_steps, found.training.auto_micro_batch, found.dataset.holds_out) == (0, False, False)
    assert resolve(job(training={"maxSteps": 10}), CHOICES).training.epochs is None


def test_some_choices_leave_the_rest_open() -> None:
    found = fill(job(), CHOICES[:2])
    assert open_settings(found) == ALL - {"lora.rank", "lora.alpha"}
    assert fill(job(), ()) == job()


def test_what_a_choice_follows_from_stays_beside_it_and_is_replaced_where_the_rest_is_open() -> None:
    asked = job(training={"batchSize": 8, "learningRateMultiplier": 2})
    decided = resolve(asked, CHOICES).training
    assert (decided.batch_size, decided.gradient_accumulation_steps) == (8, 2)
    assert (decided.learning_rate_multiplier, decided.learning_rate) == (2, 0.0013)
    filled = fill(asked, CHOICES).training
    assert (filled.batch_size, filled.gradient_accumulation_steps) == (None, 2)
    assert (filled.learning_rate_multiplier, filled.learning_rate) == (None, 0.0013)
    assert fill(asked, CHOICES[:4]).training.batch_size == 8


@pytest.mark.parametrize(
    "missing",
    sorted(
        ALL
        - {"training.epochs", "training.evalEverySteps", "training.packing", "training.keep", HELD_OUT}
        - {"training.gradientCheckpointing"}
    ),
)
def test_a_job_without_a_choice_that_it_needs_is_not_resolved(missing: str) -> None:
    with pytest.raises(ValidationError, match=missing.rpartition(".")[2]):
        resolve(job(), [each for each in CHOICES if each.setting != missing])


def test_an_earlier_adapter_decides_only_what_the_job_leaves_open() -> None:
    decided = [decided_lora(LoraSpec(rank=rank), 48, 7) for rank in (None, 8)]
    assert [(each.rank, each.alpha) for each in decided] == [(48, 7), (8, 7)]


def test_the_choices_are_one_sentence_with_their_reasons() -> None:
    assert sentence(CHOICES[:2]) == "automatic: rank 16 (few tokens), alpha 32"
    assert sentence(()) is None
