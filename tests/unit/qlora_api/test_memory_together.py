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
from tests.support.models.model_configs import LLAMA_2_7B, LLAMA_3_8B

MODEL, WITHOUT_GROUPS = (ModelShape.from_config(config) for config in (LLAMA_3_8B, LLAMA_2_7B))
DEFAULT = TrainingShape(rank=16)
TRAININGS = {
    "default": DEFAULT,
    "long": replace(DEFAULT, sequence_length=4096),
    "large": replace(DEFAULT, rank=64, micro_batch_size=8),
    "8-bit": replace(DEFAULT, optimizer="paged_adamw_8bit"),
    "not paged": replace(DEFAULT, optimizer="adamw"),
    "kept": replace(DEFAULT, recomputed_blocks=0),
    "not accumulated": replace(DEFAULT, gradient_accumulation_steps=1),
}


DIFFERENT = (
    TrainingShape(rank=16, sequence_length=1024),
    TrainingShape(rank=64, sequence_length=256, optimizer="adamw"),
    TrainingShape(rank=8, sequence_length=2048, gradient_accumulation_steps=1, adapter_bytes=2),
)
"""Of other ranks, optimizers and lengths. The last accumulates nothing."""


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
    assert 0.9 * planned.low <= peak.low <= planned.low


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
    assert ShareOfMemory.from_status(known) == ShareOfMemory(9 * GIB, 7 * GIB, 5 * GIB)
    for field in ("estimate_bytes", "low_bytes", "shared_bytes"):
        assert ShareOfMemory.from_status(known.model_copy(update={field: None})) is None
    assert ShareOfMemory.from_status(None) is None
    assert math.floor(add_up([ShareOfMemory(9, 7, 5)]).low) == 7


def test_jobs_that_are_trained_together_have_one_base_and_all_else_of_each() -> None:
    alone = [estimate(MODEL, training) for training in DIFFERENT]
    memory = estimate_together(MODEL, DIFFERENT)
    for shared in ("context", "base_weights", "unquantized_weights"):
        assert {getattr(memory, shared)} == {getattr(one, shared) for one in alone}
    for own in ("adapters", "optimizer", "pageable_optimizer"):
        assert getattr(memory, own) == sum(getattr(one, own) for one in alone)
    base = memory.context + memory.base_weights + memory.unquantized_weights
    assert max(one.expected for one in alone) < memory.expected < sum(one.expected - base for one in alone) + base


def test_a_group_of_one_job_takes_the_memory_of_that_job() -> None:
    for training in DIFFERENT:
        assert estimate_together(MODEL, [training]) == estimate(MODEL, training)


def test_micro_batches_in_one_pass_take_the_memory_of_one_of_as_many_tokens() -> None:
    one, four = TrainingShape(sequence_length=512), TrainingShape(sequence_length=2048)
    together, single = estimate_together(WITHOUT_GROUPS, [one] * 4), estimate(WITHOUT_GROUPS, four)
    for shared in ("checkpoints", "layer_working_set", "logits"):
        assert getattr(together, shared) == getattr(single, shared)


def test_jobs_that_do_not_accumulate_are_in_the_first_pass_of_a_step_only() -> None:
    """The first pass has no gradients yet; later passes have those of all."""
    several = TrainingShape(sequence_length=256)
    single = TrainingShape(sequence_length=256, gradient_accumulation_steps=1)
    first, later = (
        estimate_together(WITHOUT_GROUPS, [several, replace(single, sequence_length=tokens)]) for tokens in (16384, 256)
    )
    assert first.checkpoints == 2 * (256 + 16384) * 32 * 4096
    assert "gradients" in first.absent_at_peak
    assert later.checkpoints == 2 * 256 * 32 * 4096
    assert not later.absent_at_peak & {"gradients", "checkpoints"}
