"""The memory of a job from dry runs: interpolation between them, and no repetition."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qlora_api.memory.advice import advice, larger_micro_batch, larger_micro_batches
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import Measure, MeasuredJob, measure_further, measured_estimate
from tests.support.resolved import resolved_spec

MIB = 2**20


def measured(*steps: tuple[StepSize, int], digest: str = "", rank: int = 16) -> MeasuredMemory:
    """Return steps that keep so many bytes, with 2x for the loss and 3x for layers."""
    return MeasuredMemory(
        digest=digest,
        blocks=2,
        rank=rank,
        quantized_parameters=2**30,
        unquantized_bytes=100 * MIB,
        adapter_parameters=16 * 2**20,
        pageable_parameters=16 * 2**20,
        whole_parameters=0,
        steps=tuple(MeasuredStep(**asdict(size), kept=kept, loss=2 * kept, work=3 * kept) for size, kept in steps),
    )


class Measuring:
    """A dry run that takes 10 KiB a token, half with checkpointing."""

    def __init__(self) -> None:
        self.sizes: list[StepSize] = []

    def __call__(self, config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        self.sizes += sizes
        each = [
            (size, size.sequences * size.sequence_tokens * (5120 if size.gradient_checkpointing else 10240))
            for size in sizes
        ]
        return measured(*each, digest=digest, rank=spec.lora.rank)


def job(**settings: object) -> ResolvedSpec:
    sources = {"model": {"source": "hf://acme/model"}, "dataset": {"source": "hf://acme/rows"}}
    return resolved_spec(QLoRAJobSpec.model_validate(sources | settings))


def plan(config: Path, spec: ResolvedSpec, measure: Measure, earlier: MeasuredJob | None = None) -> MeasuredJob:
    measured_earlier = None if earlier is None else earlier.measured
    return MeasuredJob.from_config(config, spec, training_shape(spec, ()), measured_earlier, measure)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "starcoder2"}))
    return path


SHORT, LONG = StepSize(1, 1024, True), StepSize(4, 1024, True)
POINTS = measured((SHORT, 10 * MIB), (LONG, 70 * MIB))


@pytest.mark.parametrize(
    ("size", "tokens", "kept"),
    [(1, 1024, 10), (2, 1024, 30), (4, 1024, 70), (8, 1024, 140), (1, 256, 10)],
    ids=["measured", "between", "measured too", "beyond", "below"],
)
def test_a_step_between_two_lies_on_a_straight_line(size: int, tokens: int, kept: int) -> None:
    memory = measured_estimate(POINTS, TrainingShape(rank=16, micro_batch_size=size, sequence_length=tokens))
    assert memory.checkpoints == kept * MIB
    assert (memory.logits, memory.layer_working_set) == (2 * kept * MIB, 3 * kept * MIB)


def test_the_shares_of_a_measured_model_add_up_to_the_peak() -> None:
    memory = measured_estimate(POINTS, TrainingShape(rank=16, sequence_length=1024, double_quantization=False))
    assert memory.base_weights == 2**30 * 9 // 16
    assert memory.unquantized_weights == 100 * MIB
    assert memory.adapters == memory.gradients == 64 * MIB
    assert memory.optimizer == memory.pageable_optimizer == 128 * MIB
    weights = memory.context + memory.base_weights + memory.unquantized_weights + 256 * MIB
    assert memory.expected == weights + (10 + 30) * MIB


def test_half_the_rank_halves_the_adapter() -> None:
    whole, half = (measured_estimate(POINTS, TrainingShape(rank=rank, sequence_length=1024)) for rank in (16, 8))
    assert (half.adapters, half.optimizer) == (whole.adapters // 2, whole.optimizer // 2)
    assert half.layer_working_set == whole.layer_working_set


def test_without_checkpointing_all_kept_tensors_are_the_working_set() -> None:
    kept = measured((StepSize(1, 1024, False), 10 * MIB))
    memory = measured_estimate(kept, TrainingShape(rank=16, sequence_length=1024, recomputed_blocks=0))
    assert memory.checkpoints == 0
    assert memory.layer_working_set == 40 * MIB


def test_a_dry_run_is_not_repeated_unless_something_that_it_depends_on_changes(config: Path) -> None:
    measuring = Measuring()
    first = plan(config, job(), measuring)
    same = job(training={"learningRate": 1e-3}, resources={"gpuMemory": "24Gi"})
    again = plan(config, same, measuring, first)
    assert again.measured == first.measured
    assert measuring.sizes == [StepSize(1, 512, True)]

    longer = job(training={"maxSequenceLength": 4096})
    plan(config, longer, measuring, first)
    config.write_text(json.dumps({"model_type": "starcoder2", "hidden_size": 64}))
    plan(config, job(), measuring, first)
    assert measuring.sizes[1:] == [StepSize(1, 4096, True), StepSize(1, 512, True)]


def test_advice_takes_a_few_more_dry_runs(config: Path) -> None:
    spec = job(
        lora={"rank": 16}, training={"microBatchSize": 8, "maxSequenceLength": 1024, "gradientCheckpointing": False}
    )
    measuring = Measuring()
    planned = plan(config, spec, measuring).with_smaller()
    assert measuring.sizes == [
        StepSize(8, 1024, False),
        StepSize(1, 256, False),
        StepSize(1, 512, False),
        StepSize(1, 1024, False),
        StepSize(1, 256, True),
        StepSize(1, 512, True),
        StepSize(1, 1024, True),
        StepSize(8, 1024, True),
    ]
    assert planned.with_smaller() == planned
    first = advice(planned.estimate, planned.training, 1.75)[0]
    assert [change.setting for change in first.changes] == ["training.gradientCheckpointing"]


def test_a_larger_micro_batch_is_measured_before_it_is_advised(config: Path) -> None:
    spec = job(training={"maxSequenceLength": 1024})
    measuring = Measuring()
    planned = plan(config, spec, measuring).with_larger()
    assert measuring.sizes == [StepSize(1, 1024, True), StepSize(4, 1024, True)]
    step = larger_micro_batch(planned.estimate, planned.training, 24)
    assert step is not None
    assert [(change.setting, change.proposed) for change in step.changes] == [
        ("training.microBatchSize", "4"),
        ("training.gradientAccumulationSteps", "4"),
    ]


@pytest.mark.parametrize(
    ("gpus", "steps", "sizes"),
    [(1, 6, [3, 2]), (4, 6, [2]), (2, 5, []), (2, 8, [4, 2]), (4, 16, [4, 2])],
    ids=["one GPU", "not even", "odd", "two GPUs", "four GPUs"],
)
def test_no_larger_micro_batch_gives_a_gpu_more_to_do(gpus: int, steps: int, sizes: list[int]) -> None:
    training = TrainingShape(sequence_length=1024, gradient_accumulation_steps=steps, gpus=gpus)
    assert [larger.micro_batch_size for larger in larger_micro_batches(training)] == sizes


def test_a_run_that_may_halve_its_micro_batch_has_its_smallest_size(config: Path) -> None:
    spec = job(training={"microBatchSize": 8, "autoMicroBatch": True})
    planned = plan(config, spec, Measuring())
    whole, halved = (planned.estimate(replace(planned.training, micro_batch_size=size)) for size in (8, 1))
    assert whole.checkpoints == 8 * halved.checkpoints


def test_the_loss_is_measured_at_its_largest_chunk(config: Path) -> None:
    short = job(training={"maxSequenceLength": 256})
    larger = Measuring()
    plan(config, short, larger).with_larger()
    assert larger.sizes == [StepSize(1, 256, True), StepSize(16, 256, True), StepSize(1, 512, True)]

    long = job(training={"maxSequenceLength": 2048})
    smaller = Measuring()
    plan(config, long, smaller).with_smaller()
    assert smaller.sizes == [StepSize(1, 2048, True), StepSize(1, 256, True), StepSize(1, 512, True)]


def test_advice_comes_from_the_jobs_own_dry_run_if_another_fails(config: Path) -> None:
    def failing(*_arguments: object) -> MeasuredMemory:
        raise DryRunFailed("too long")

    planned = plan(config, job(), Measuring())
    planned = replace(planned, measure=failing)
    assert measure_further(planned, planned.with_larger) is planned
