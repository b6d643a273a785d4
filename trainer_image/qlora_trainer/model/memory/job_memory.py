"""The GPU memory of a job with any settings, alone or with others, from dry runs of its model."""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora_api.contract import GPU_LOSS_CHUNK_TOKENS
from qlora_api.gpus import has_room_for_groups
from qlora_api.memory.advice import SHORTEST_SEQUENCE, larger_micro_batches
from qlora_api.memory.estimate import ActivationBytes, AnswerBytes, CountedRun, MemoryEstimate, combine
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.memory.weights import WeightCounts
from qlora_api.schema import replace
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.dry_run import StepSize, measure_together_within_limits, measure_within_limits

logger = logging.getLogger(__name__)
Measure = Callable[[Path, ResolvedSpec, Sequence[StepSize], str], MeasuredMemory]
MeasurePasses = Callable[[Path, Sequence[ResolvedSpec], Sequence[tuple[int, ...]]], tuple[ActivationBytes, ...]]
"""Measures passes of some of the jobs, given by their numbers."""
_MOST_OF_HOST = 0.5
"""Of a pod's memory, for inputs of blocks: the rest is for the trainer, checkpoints and paged optimizer state."""
_PACKAGES = ("qlora-operator", "torch", "transformers", "peft", "bitsandbytes")


def measured_estimate(measured: MeasuredMemory, training: TrainingShape) -> MemoryEstimate:
    """The estimate of the measured model with these settings.

    Activations are interpolated between the measured steps with the same gradient checkpointing, by the tokens of the
    micro batch: what a step takes is a largest of sums that grow linearly with them, so a straight line between two
    steps is never too low. The loss alone grows no further beyond a chunk of tokens, so a step of that size must exist.
    Below the smallest step they are that step's, beyond the largest they grow in proportion.
    A smaller rank is given the activations of the measured one, and gradient checkpointing what there is without it if
    no step was measured with it. If some blocks are recomputed, each frees all it keeps but its input: the peak is at
    the last block, as if none was, or at a recomputed one, as if all were, with the others' activations freed.
    """
    return _combine([(measured, training)], lambda trainings: _activations(measured, trainings[0]))


def pod_memory_for_inputs(on_gpu: MemoryEstimate, offloaded: MemoryEstimate, gpus: int) -> int:
    """Return the bytes that a pod needs to hold the inputs of blocks of so many GPUs; 0 if there are none."""
    return math.ceil((on_gpu.checkpoints - offloaded.checkpoints) * gpus / _MOST_OF_HOST)


def memory_together(
    config: Path,
    specs: Sequence[ResolvedSpec],
    alone: "Sequence[MeasuredJob]",
    measure: MeasurePasses = measure_together_within_limits,
) -> MemoryEstimate:
    """The peak of jobs trained together, whose model has this config.json. `alone` is that of each.

    Raises as the dry run does.
    """
    each = tuple(range(len(alone)))
    accumulating = tuple(number for number in each if alone[number].training.gradient_accumulation_steps > 1)
    passes = sorted({each, accumulating} - {()}, key=len)
    found = dict(zip(map(len, passes), measure(config, specs, passes), strict=True))
    return _combine([(job.measured, job.training) for job in alone], lambda passing: found[len(passing)])


def _combine(
    runs: Sequence[tuple[MeasuredMemory, TrainingShape]],
    activations: Callable[[Sequence[TrainingShape]], ActivationBytes],
) -> MemoryEstimate:
    first, _ = runs[0]
    answers = AnswerBytes(first.answer_bytes_per_token, first.answer_bytes_per_pair)
    return combine([CountedRun(_count_weights(*run), run[1]) for run in runs], activations, answers)


def _count_weights(measured: MeasuredMemory, training: TrainingShape) -> WeightCounts:
    share = training.rank / measured.rank
    return WeightCounts(
        blocks=measured.blocks,
        quantized_parameters=measured.quantized_parameters,
        mxfp4_parameters=measured.mxfp4_parameters,
        two_blocks=measured.two_blocks,
        unquantized_bytes=measured.unquantized_bytes,
        vocabulary_bytes=measured.vocabulary_bytes,
        adapter_parameters=round(measured.adapter_parameters * share),
        pageable_parameters=round(measured.pageable_parameters * share),
        whole_parameters=measured.whole_parameters,
    )


def _activations(measured: MeasuredMemory, training: TrainingShape) -> ActivationBytes:
    steps, tokens, blocks = measured.steps, training.tokens, training.recomputed_blocks
    kept, loss, work, *of_blocks = _interpolated(steps, tokens, is_checkpointed=blocks is None)
    if training.offloads_inputs:
        # On the GPU are the first, which the embeddings' output is, and that of the block at work.
        kept, work = kept - sum(of_blocks[1:]), work + max(of_blocks, default=0)
    if blocks:
        inputs, _, recomputing, *_ = _interpolated(steps, tokens, is_checkpointed=True)
        kept = kept - sum(of_blocks[:blocks]) + inputs * blocks // measured.blocks
        work = max(work, inputs + recomputing - kept)
    return ActivationBytes.from_pass(kept, loss, work, recomputes_all=blocks is None)


def _interpolated(steps: Sequence[MeasuredStep], tokens: int, *, is_checkpointed: bool) -> list[int]:
    """Return kept, loss, work, and what each block keeps, of a step with so many tokens."""
    # Recomputing takes no more than keeping everything.
    ways = [is_checkpointed] if is_checkpointed in {step.gradient_checkpointing for step in steps} else [True, False]
    points = {
        step.tokens: (step.kept, step.loss, step.work, *step.blocks)
        for step in steps
        if step.gradient_checkpointing in ways
    }
    below = max((size for size in points if size <= tokens), default=min(points))
    above = min((size for size in points if size >= tokens), default=None)
    if above is None:
        return [-(-size * tokens // below) for size in points[below]]
    if above <= below:
        return list(points[below])
    share = (tokens - below) / (above - below)
    return [round(low + share * (high - low)) for low, high in zip(points[below], points[above], strict=True)]


@dataclass(frozen=True)
class MeasuredJob:
    """A job's model with its dry runs so far, and how to do more."""

    config: Path
    spec: ResolvedSpec
    training: TrainingShape
    measured: MeasuredMemory
    measure: Measure

    @classmethod
    def from_config(
        cls,
        config: Path,
        spec: ResolvedSpec,
        training: TrainingShape,
        earlier: MeasuredMemory | None = None,
        measure: Measure = measure_within_limits,
    ) -> "MeasuredJob":
        """The job with its micro batch measured, as far as `earlier` does not hold. Raises as the dry run does.

        If the run may halve it, the smallest is measured too; if it recomputes some blocks, all and none.
        """
        digest, own = _digest(config, spec), _size(training)
        halves = spec.training.auto_micro_batch and own.sequences > 1
        sizes = [own, dataclasses.replace(own, sequences=1)] if halves else [own]
        if training.recomputed_blocks:
            sizes += [dataclasses.replace(size, gradient_checkpointing=True) for size in sizes]
        if earlier is None or earlier.digest != digest:
            earlier = measure(config, spec, sizes, digest)
        return cls(config, spec, training, earlier, measure)._with(sizes)

    def estimate(self, training: TrainingShape) -> MemoryEstimate:
        """The estimate with other settings."""
        return measured_estimate(self.measured, training)

    @property
    def parameters(self) -> int:
        """Of the model, without its adapter."""
        return _count_weights(self.measured, self.training).parameters

    def with_smaller(self) -> "MeasuredJob":
        """The job with the steps measured that memory-saving settings need."""
        own = _size(self.training)
        smallest = min(own.sequence_tokens, SHORTEST_SEQUENCE)
        shapes = {(own.sequences, own.sequence_tokens), (1, own.sequence_tokens), (1, smallest)}
        if smallest < GPU_LOSS_CHUNK_TOKENS < own.sequences * own.sequence_tokens:
            shapes.add((1, GPU_LOSS_CHUNK_TOKENS))
        ways = {own.gradient_checkpointing, True}
        return self._with([StepSize(*shape, way) for way in sorted(ways) for shape in sorted(shapes)])

    def with_larger(self) -> "MeasuredJob":
        """The job with the largest advisable micro batch measured, if there is one."""
        largest = next(larger_micro_batches(self.training), None)
        if largest is None:
            return self
        sizes = [_size(largest)]
        if self.training.tokens < GPU_LOSS_CHUNK_TOKENS < largest.tokens:
            sizes.append(StepSize(1, GPU_LOSS_CHUNK_TOKENS, sizes[0].gradient_checkpointing))
        return self._with(sizes)

    def _with(self, sizes: Sequence[StepSize]) -> "MeasuredJob":
        known = {StepSize(s.sequences, s.sequence_tokens, s.gradient_checkpointing) for s in self.measured.steps}
        missing = [size for size in sizes if size not in known]
        if not missing:
            return self
        more = self.measure(self.config, self.spec, missing, self.measured.digest)
        steps = (*self.measured.steps, *more.steps)
        return dataclasses.replace(self, measured=replace(self.measured, steps=steps))


def _size(training: TrainingShape) -> StepSize:
    """The step of all blocks that are recomputed, or none if some are kept."""
    return StepSize(training.micro_batch_size, training.sequence_length, training.recomputed_blocks is None)


def _digest(config: Path, spec: ResolvedSpec) -> str:
    """SHA-256 of what a dry run depends on besides its micro batch: the model, the settings, and the code."""
    training = spec.training
    depends_on: Mapping[str, object] = {
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "lora": replace(spec.lora, initial_adapter=None).dump(),
        "quantization": spec.quantization.dump(),
        "groups_experts": has_room_for_groups(spec.resources.gpu_gib),
        "tokens": training.max_sequence_length,
        **({"objective": training.objective} if training.compares_answers else {}),
        "versions": [_version(package) for package in _PACKAGES],
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def measure_further(job: MeasuredJob, further: Callable[[], MeasuredJob]) -> MeasuredJob:
    """The job with the measurements for advice, which is rougher without them."""
    try:
        return further()
    except DryRunFailed as failure:
        logger.warning("the advice is from the job's own dry run alone: %s", failure)
        return job
