"""Whether a run fits a GPU, and which settings are advised if it does not, or with room."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pytest

from qlora_api.memory.advice import Advice, advice, budget, first_change, larger_micro_batch, more_gpus, room, verdict
from qlora_api.memory.estimate import GIB
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape
from tests.support.dry_runs import estimate
from tests.support.models.model_configs import LLAMA_2_7B, LLAMA_3_8B, dense

LLAMA_65B = dense("llama", 80, 8192, 22016, (64, 64, 128), 32000)
OF_7B, OF_8B, OF_65B = (
    partial(estimate, ModelShape.from_config(config)) for config in (LLAMA_2_7B, LLAMA_3_8B, LLAMA_65B)
)


def changes(steps: Iterable[Advice]) -> list[tuple[str, str, str]]:
    """Each changed setting, with both values."""
    return [(change.setting, change.current, change.proposed) for step in steps for change in step.changes]


def settings(steps: Iterable[Advice]) -> list[str]:
    return [setting for setting, _, _ in changes(steps)]


def test_the_verdict_turns_exactly_at_its_bounds() -> None:
    memory = OF_65B(TrainingShape())
    enough = memory.expected * 1.07 / (0.98 * GIB)
    least = memory.low / (0.985 * GIB)
    assert verdict(memory, enough * 1.0001) == "fits"
    assert verdict(memory, enough * 0.9999) == "tight"
    assert verdict(memory, least * 1.0001) == "tight"
    assert verdict(memory, least * 0.9999) == "exceeds"


@pytest.mark.parametrize("gpu_gib", [0.0, -1.0, float("nan"), float("inf")])
def test_a_gpu_without_memory_is_rejected(gpu_gib: float) -> None:
    with pytest.raises(ValueError, match="gpu_gib"):
        budget(gpu_gib)


def test_a_run_that_fits_gets_no_advice() -> None:
    assert advice(OF_7B, TrainingShape(), 24) == ()


def test_a_smaller_micro_batch_is_advised_first_and_keeps_the_batch() -> None:
    training = TrainingShape(micro_batch_size=8, sequence_length=4096, gradient_accumulation_steps=2)
    (step,) = advice(OF_8B, training, 24)
    assert changes([step]) == [
        ("training.microBatchSize", "8", "4"),
        ("training.gradientAccumulationSteps", "2", "4"),
    ]
    assert step.verdict == "fits"
    assert step.expected == OF_8B(step.training).expected
    (step,) = advice(OF_8B, replace(training, has_batch_size=True), 24)
    assert changes([step]) == [("training.microBatchSize", "8", "4")]


def test_gradient_checkpointing_is_advised_before_anything_that_costs_quality() -> None:
    training = TrainingShape(recomputed_blocks=0, sequence_length=4096)
    (step,) = advice(OF_8B, training, 24)
    assert settings([step]) == ["training.gradientCheckpointing"]


def test_shorter_answers_are_advised_where_answers_make_the_peak() -> None:
    training = TrainingShape(rank=8, sequence_length=256, optimizer="paged_adamw_8bit", answer_tokens=(256, 1280))
    before = OF_7B(training)
    steps = advice(OF_7B, training, before.expected * 1.04 / GIB / 0.98)
    assert ("gate.score.maxNewTokens", "1024", "512") in changes(steps)
    assert steps[-1].verdict == "fits"


def test_steps_build_on_each_other_until_the_run_fits() -> None:
    steps = advice(OF_65B, TrainingShape(micro_batch_size=4, sequence_length=2048, double_quantization=False), 48)
    assert settings(steps) == [
        "training.microBatchSize",
        "training.gradientAccumulationSteps",
        "quantization.doubleQuant",
        "training.optimizer",
    ]
    assert [step.verdict for step in steps] == ["tight", "tight", "fits"]
    expected = [step.expected for step in steps]
    assert expected == sorted(expected, reverse=True)


def test_a_model_beyond_the_card_gets_every_step_and_an_honest_last_verdict() -> None:
    steps = advice(OF_65B, TrainingShape(micro_batch_size=2, sequence_length=2048), 24)
    assert settings(steps) == [
        "training.microBatchSize",
        "training.gradientAccumulationSteps",
        "training.optimizer",
        "training.maxSequenceLength",
        "lora.rank",
        "lora.dtype",
    ]
    assert steps[-1].verdict == "exceeds"
    assert all(step.effect for step in steps)


def test_the_adapter_type_is_advised_by_its_name_in_the_spec() -> None:
    training = TrainingShape(rank=8, optimizer="paged_adamw_8bit", sequence_length=256)
    needed = OF_65B(replace(training, adapter_bytes=2)).expected * 1.07 / (0.98 * GIB)
    (step,) = advice(OF_65B, training, needed * 1.0001)
    assert changes([step]) == [("lora.dtype", "float32", "bfloat16")]


def test_a_step_that_hardly_saves_anything_is_left_out() -> None:
    steps = advice(OF_65B, TrainingShape(micro_batch_size=2, sequence_length=16), 24)
    assert settings(steps) == ["training.optimizer", "lora.rank", "lora.dtype"]


def test_a_run_that_barely_fits_gets_the_first_advice() -> None:
    training = TrainingShape(rank=64, sequence_length=512)
    memory = OF_65B(training)
    gpu_gib = memory.expected / GIB + 1
    assert verdict(memory, gpu_gib) == "tight"
    step = first_change(OF_65B, training, gpu_gib)
    assert step is not None
    assert changes([step]) == [("training.optimizer", "paged_adamw_32bit", "paged_adamw_8bit")]
    assert room(memory, gpu_gib) < room(OF_65B(step.training), gpu_gib)


def test_with_room_larger_micro_batches_of_up_to_4096_tokens_are_advised() -> None:
    step = larger_micro_batch(OF_7B, TrainingShape(sequence_length=1024), 80)
    assert step is not None
    assert (step.training.micro_batch_size, step.training.gradient_accumulation_steps) == (4, 4)
    assert step.expected == OF_7B(step.training).expected
    assert changes([step]) == [("training.microBatchSize", "1", "4"), ("training.gradientAccumulationSteps", "16", "4")]


def test_a_larger_micro_batch_leaves_room() -> None:
    training = TrainingShape(sequence_length=512)
    smallest = OF_7B(training)
    sizes = set()
    for gib in range(7, 13):
        step = larger_micro_batch(OF_7B, training, gib)
        assert step is None or smallest.expected < step.expected * 1.07 < budget(gib) * 0.95
        sizes.add(1 if step is None else step.training.micro_batch_size)
    assert {1, 8} < sizes


@pytest.mark.parametrize(
    "training",
    [
        TrainingShape(sequence_length=4096),
        TrainingShape(gradient_accumulation_steps=1),
        TrainingShape(gradient_accumulation_steps=3, sequence_length=2048),
        TrainingShape(gradient_accumulation_steps=4, gpus=4),
    ],
    ids=["long sequences", "one micro batch", "an odd number", "one for each GPU"],
)
def test_a_batch_that_does_not_come_in_larger_micro_batches_gets_no_such_advice(training: TrainingShape) -> None:
    assert larger_micro_batch(OF_7B, training, 80) is None


def test_gpus_that_there_are_share_the_base_before_anything_costs_quality() -> None:
    (step,) = advice(OF_65B, TrainingShape(gpus=8), 24)
    assert changes([step]) == [("training.sharding", "none", "full")]
    assert step.verdict == "fits"


def test_the_fewest_gpus_are_advised_that_fit_with_a_shared_base() -> None:
    training = TrainingShape()
    assert advice(OF_65B, training, 32)[-1].verdict != "fits"
    step = more_gpus(OF_65B, training, 32)
    assert step is not None
    assert changes([step]) == [
        ("training.optimizer", "paged_adamw_32bit", "paged_adamw_8bit"),
        ("resources.gpus", "1", "2"),
        ("training.sharding", "none", "full"),
    ]
    assert (step.expected, step.verdict) == (OF_65B(step.training).expected, "fits")
    assert more_gpus(OF_65B, training, 8) is None
    assert more_gpus(OF_65B, replace(training, fixed=frozenset({"sharding"})), 32) is None
