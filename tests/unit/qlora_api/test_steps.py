"""How many optimizer steps a run makes, and what is remarked on few."""

from typing import Any

import pytest

from qlora_api.steps import few_steps_remark, optimizer_steps
from tests.support.resolved import resolved_training

NOTHING, LITTLE = "most adapters learn next to nothing", "many adapters learn too little"


def remark(sequences: int, **settings: Any) -> str | None:
    gpus = settings.pop("gpus", 1)
    training = resolved_training(**settings)
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    steps = optimizer_steps(sequences, per_step, training.epochs, training.max_steps)
    return few_steps_remark(training, steps, sequences, gpus)


EPOCH = "(1 epoch × {} sequences / (microBatchSize 1 × gradientAccumulationSteps 16)), so that"
THRICE = "(3 epochs × 3 sequences / (microBatchSize 2 × gradientAccumulationSteps 1)), so that"


@pytest.mark.parametrize(
    ("sequences", "settings", "made", "remedy"),
    [
        (13, {}, f"1 optimizer step {EPOCH}", "gradientAccumulationSteps: 1 makes 13, epochs: 8 then 104"),
        (500, {}, f"32 optimizer steps {EPOCH}", "gradientAccumulationSteps: 4 makes 125"),
        (1584, {}, f"99 optimizer steps {EPOCH}", "gradientAccumulationSteps: 8 makes 198"),
        (
            3,
            {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 3},
            f"6 optimizer steps {THRICE}",
            "epochs: 50 makes 100, or add rows",
        ),
        (500, {"max_steps": 19}, "19 optimizer steps (maxSteps: 19), so that", "maxSteps: 100 or more makes enough"),
    ],
)
def test_few_steps_are_reported_with_their_reason_and_remedies(
    sequences: int, settings: dict[str, Any], made: str, remedy: str
) -> None:
    effect = LITTLE if int(made.split()[0]) >= 20 else NOTHING
    assert remark(sequences, **settings) == f"the run makes {made.format(sequences)} {effect}: a run with {remedy}"


def test_a_batch_size_is_the_reason_and_what_to_change() -> None:
    settings = {"micro_batch_size": 8, "gradient_accumulation_steps": 2, "batch_size": 16, "packing": False}
    found = remark(300, **settings)
    assert found == (
        "the run makes 19 optimizer steps (1 epoch × 300 sequences / batchSize 16), so that "
        f"{NOTHING}: a run with batchSize: 2 makes 150"
    )
    assert "batchSize: 4 makes 75, epochs: 2 then 150" in (remark(300, **settings, gpus=4) or "")


def test_a_hundred_steps_are_not_few() -> None:
    assert remark(1585) is None
    assert remark(500, max_steps=100) is None


def test_each_gpu_keeps_a_share_of_the_micro_batches() -> None:
    assert "gradientAccumulationSteps: 4 makes 4, epochs: 25 then 100" in (remark(13, gpus=4) or "")
    assert "epochs: 100 makes 100" in (remark(13, gpus=3) or ""), "16 cannot be shared by three at all"


@pytest.mark.parametrize("sequences", [1, 13, 99, 500])
@pytest.mark.parametrize("epochs", [None, 3])
def test_the_promised_steps_are_those_of_the_changed_settings(sequences: int, epochs: int | None) -> None:
    found = remark(sequences, epochs=epochs)
    assert found is not None
    changed: dict[str, Any] = {"epochs": epochs}
    for change in found.rpartition(": a run with ")[2].split(", "):
        if change == "or add rows":
            continue
        name, value, _, promised = change.replace(":", "").split()
        changed["epochs" if name == "epochs" else "gradient_accumulation_steps"] = int(value)
        per_step = changed.get("gradient_accumulation_steps", 16)
        assert optimizer_steps(sequences, per_step, changed["epochs"], None) == int(promised)
    assert remark(sequences, **changed) is None
