"""Memory of jobs trained together, from that of each, and as in `qlora plan`."""

import math
from dataclasses import replace

import pytest

from qlora_api.memory.estimate import GIB
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.together import ShareOfMemory, add_up, shared_bytes
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.status import MemoryStatus
from tests.support.dry_runs import estimate, estimate_together

MODEL = ModelShape.from_config(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
DEFAULT = TrainingShape(rank=16)
TRAININGS = {
    "default": DEFAULT,
    "long": replace(DEFAULT, sequence_length=4096),
    "large": replace(DEFAULT, rank=64, micro_batch_size=8),
    "8-bit": replace(DEFAULT, optimizer="paged_adamw_8bit"),
    "not paged": replace(DEFAULT, optimizer="adamw"),
    "kept": replace(DEFAULT, gradient_checkpointing=False),
    "not accumulated": replace(DEFAULT, gradient_accumulation_steps=1),
}


def share(training: TrainingShape, jobs: int) -> ShareOfMemory:
    """What prepare finds out about a job in a group of so many."""
    alone = estimate(MODEL, training)
    shared = shared_bytes(alone, estimate_together(MODEL, [training] * jobs), jobs)
    return ShareOfMemory(alone.expected, alone.low, shared)


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("jobs", [2, 4, 16])
def test_jobs_that_are_alike_take_what_the_plan_shows(name: str, jobs: int) -> None:
    training = TRAININGS[name]
    peak, planned = add_up([share(training, jobs)] * jobs), estimate_together(MODEL, [training] * jobs)
    assert peak.expected == pytest.approx(planned.expected, abs=jobs)
    assert peak.low == pytest.approx(planned.low, abs=2 * jobs)


def test_fewer_of_them_take_less() -> None:
    eight = share(DEFAULT, 8)
    assert add_up([eight]).expected == estimate(MODEL, DEFAULT).expected
    two = add_up([eight] * 2).expected
    assert two == pytest.approx(estimate_together(MODEL, [DEFAULT] * 2).expected, rel=0.03)


@pytest.mark.parametrize(
    "names",
    [("default", "long"), ("default", "large", "8-bit", "not paged"), ("long", *["default"] * 7)],
)
def test_jobs_that_differ_take_about_what_the_plan_shows_and_never_surely_more(names: tuple[str, ...]) -> None:
    trainings = [TRAININGS[name] for name in names]
    peak = add_up([share(training, len(names)) for training in trainings])
    planned = estimate_together(MODEL, trainings)
    assert peak.expected == pytest.approx(planned.expected, rel=0.05)
    assert peak.low <= planned.low * 1.01


def test_without_what_is_shared_nothing_is_known() -> None:
    known = MemoryStatus(estimate_bytes=9 * GIB, low_bytes=7 * GIB, shared_bytes=5 * GIB, verdict="fits")
    assert ShareOfMemory.of(known) == ShareOfMemory(9 * GIB, 7 * GIB, 5 * GIB)
    for field in ("estimate_bytes", "low_bytes", "shared_bytes"):
        assert ShareOfMemory.of(known.model_copy(update={field: None})) is None
    assert ShareOfMemory.of(None) is None
    assert math.floor(add_up([ShareOfMemory(9, 7, 5)]).low) == 7
