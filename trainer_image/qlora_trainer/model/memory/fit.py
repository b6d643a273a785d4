"""Decides whether a job fits its GPU, before any weight is fetched."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.memory.advice import (
    ADAPTER_FIELDS,
    RUN_FIELDS,
    SHARDING_FIELDS,
    Advice,
    Verdict,
    advice,
    budget,
    larger_micro_batch,
    more_gpus,
    verdict,
)
from qlora_api.memory.estimate import GIB, ActivationBytes
from qlora_api.memory.model_shape import ModelShape, UnlistedModelError, UnsupportedModelError
from qlora_api.memory.together import shared_bytes
from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation, TrainingShape
from qlora_api.memory.weights import WeightCounts, count_weights
from qlora_api.schema import replace
from qlora_api.spec.gate import MAX_PROMPT_TOKENS
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.status import MAX_MESSAGE_LENGTH, MemoryStatus
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.sandbox import DryRunFailed
from qlora_trainer.model.memory.dry_run import measure_together_within_limits, measure_within_limits
from qlora_trainer.model.memory.job_memory import (
    Measure,
    MeasuredJob,
    MeasurePasses,
    measure_further,
    memory_together,
    pod_memory_for_inputs,
)


def read_shape(config: Path) -> ModelShape | None:
    """The sizes in a model's config.json, or None if its family is not listed.

    Raises StepFailure BAD_CONFIGURATION for a size that no model has.
    """
    try:
        return ModelShape.from_config(json.loads(config.read_bytes()))
    except UnlistedModelError:
        return None
    except UnsupportedModelError as error:
        raise bad_configuration(f"spec.model.source: {error}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise bad_configuration(f"the model's {config.name} is not a JSON object ({error})") from error


def type_of_model(config: Path) -> str:
    """The model's type, or an empty string. Raises StepFailure if it is no object."""
    read_shape(config)
    found = json.loads(config.read_bytes()).get("model_type")
    return found if isinstance(found, str) else ""


def training_shape(
    spec: ResolvedSpec,
    target_modules: Iterable[str],
    recomputation: Recomputation = RECOMPUTE_ALL,
) -> TrainingShape:
    """The settings of a job that decide its memory.

    `target_modules`: names of the adapted layers, exact or their last part. `recomputation`: with gradient
    checkpointing, as prepare chose.
    """
    return TrainingShape(
        rank=spec.lora.rank,
        adapter_bytes=4 if spec.lora.dtype == "float32" else 2,
        target_modules=frozenset(name.rpartition(".")[2] for name in target_modules),
        micro_batch_size=spec.training.micro_batch_size,
        sequence_length=spec.training.max_sequence_length,
        gradient_accumulation_steps=spec.training.gradient_accumulation_steps,
        optimizer=spec.training.optimizer,
        double_quantization=spec.quantization.double_quant,
        recomputed_blocks=recomputation.blocks if spec.training.gradient_checkpointing else 0,
        offloads_inputs=recomputation.offloads,
        dropout=spec.lora.dropout,
        adapted_layers=len(set(spec.lora.layers_to_transform)) if spec.lora.layers_to_transform else None,
        use_dora=spec.lora.use_dora,
        whole_modules=frozenset(spec.lora.modules_to_save or ()),
        gpus=spec.resources.gpu_count,
        sharding=spec.training.sharding,
        answer_tokens=_answer_tokens(spec),
        has_batch_size=spec.training.batch_size is not None,
        fixed=_fixed_fields(spec),
    )


def _fixed_fields(spec: ResolvedSpec) -> frozenset[str]:
    """Fields that no advice may change."""
    if spec.continues is not None:
        return RUN_FIELDS
    fixed = frozenset() if spec.lora.initial_adapter is None else ADAPTER_FIELDS
    if not _can_be_sharded(spec):
        return fixed | SHARDING_FIELDS
    return fixed if spec.resources.node_count == 1 else fixed | {"gpus"}


def _can_be_sharded(spec: ResolvedSpec) -> bool:
    sharded = replace(
        spec,
        training=replace(spec.training, sharding="full"),
        resources=replace(spec.resources, gpus=max(2, spec.resources.gpus)),
    )
    try:
        ResolvedSpec.model_validate(sharded.dump())
    except ValidationError:
        return False
    return True


def _answer_tokens(spec: ResolvedSpec) -> tuple[int, int] | None:
    """Tokens of the longest scored prompt, and of it with its answer."""
    if spec.gate is None or spec.gate.score is None:
        return None
    prompt = min(MAX_PROMPT_TOKENS, spec.training.max_sequence_length)
    return prompt, prompt + spec.gate.score.max_new_tokens


def weights_of(config: Path, training: TrainingShape) -> WeightCounts | None:
    """The weights of a job by its model's config.json, or None if its family is not listed.

    Raises StepFailure BAD_CONFIGURATION for target modules that the model does not have.
    """
    shape = read_shape(config)
    if shape is None:
        return None
    try:
        return count_weights(shape, training)
    except ValueError as error:
        raise bad_configuration(f"spec.lora.targetModules: {error}") from error


@dataclass(frozen=True)
class MemoryFit:
    """Whether a job fits its GPU."""

    status: MemoryStatus
    """The estimate: `unknown` without the GPU's size, or if the dry run failed."""
    objection: str | None
    """Why the job cannot run, with the first advice, or None."""
    parameters: int | None
    """Of the model, without its adapter, or None if unknown."""
    measured: MeasuredMemory | None
    """The dry runs that the estimate is from."""

    @classmethod
    def from_config(
        cls,
        config: Path,
        spec: ResolvedSpec,
        target_modules: Iterable[str],
        recomputation: Recomputation = RECOMPUTE_ALL,
        *,
        rows_apart: bool = True,
        gpu_gib: float | None = None,
        group_size: int = 1,
        earlier: MeasuredMemory | None = None,
        measure: Measure = measure_within_limits,
        measure_passes: MeasurePasses = measure_together_within_limits,
    ) -> "MemoryFit":
        """Estimate a job, whose model has this config.json. It cannot run if even the low estimate exceeds the GPU.

        `recomputation`: as of `training_shape`. `rows_apart`: whether a micro batch may hold several rows.
        `gpu_gib`: memory of another GPU than the job's. `group_size`: how many jobs are trained together with it,
        itself included. `earlier`: dry runs. If the dry run fails, the memory is unknown.
        Raises StepFailure BAD_CONFIGURATION for target modules that the model does not have.
        """
        training = training_shape(spec, target_modules, recomputation)
        try:
            job = MeasuredJob.from_config(config, spec, training, earlier, measure)
        except DryRunFailed as failure:
            weights = weights_of(config, training)
            status = MemoryStatus(verdict="unknown", message=f"the memory is unknown: {failure}"[:MAX_MESSAGE_LENGTH])
            return cls(status, None, None if weights is None else weights.parameters, None)
        gpu_gib = gpu_gib or spec.resources.gpu_gib
        fit = _estimate(job, gpu_gib, rows_apart=rows_apart, alone=group_size == 1)
        if group_size == 1 or not rows_apart or fit.objection is not None:
            return fit
        return _with_shared(fit, lambda: _shared_bytes(config, spec, job, group_size, measure_passes))

    def require(self) -> None:
        """Raise StepFailure DOES_NOT_FIT, with the first advice, if the job cannot run."""
        if self.objection is not None:
            raise StepFailure(ExitCode.DOES_NOT_FIT, self.objection)


def _estimate(job: MeasuredJob, gpu_gib: float | None, *, rows_apart: bool, alone: bool) -> MemoryFit:
    memory = job.estimate(job.training)
    judged: Verdict | Literal["unknown"] = "unknown" if gpu_gib is None else verdict(memory, gpu_gib)
    objection, remark = None, ""
    if gpu_gib is not None and judged in ("exceeds", "tight"):
        job = measure_further(job, job.with_smaller)
        found = (
            f"training needs about {memory.expected / GIB:.1f} GiB of GPU memory (at least {memory.low / GIB:.1f}), "
            f"and a GPU of {round(gpu_gib, 1):g} GiB (gpuMemory of spec.resources, the profile or its nodes) has "
            f"{budget(gpu_gib) / GIB:.1f} to use: {_remedy(job, gpu_gib, alone=alone)}"
        )
        objection, remark = (found, "") if judged == "exceeds" else (None, found)
    elif gpu_gib is not None and judged == "fits" and rows_apart and not job.training.recomputed_blocks:
        job = measure_further(job, job.with_larger)
        step = larger_micro_batch(job.estimate, job.training, gpu_gib)
        if step is not None:
            more = f"fits too ({step.expected / GIB:.1f} GiB) and is faster, with the same result"
            remark = f"{_settings(step)} {more}"
    status = MemoryStatus(
        estimate_bytes=memory.expected,
        low_bytes=memory.low,
        high_bytes=memory.high,
        budget_bytes=None if gpu_gib is None else budget(gpu_gib),
        verdict=judged,
        source="DryRun",
        message=remark[:MAX_MESSAGE_LENGTH],
    )
    return MemoryFit(status, objection, job.parameters, job.measured)


def _shared_bytes(config: Path, spec: ResolvedSpec, job: MeasuredJob, group_size: int, measure: MeasurePasses) -> int:
    """Bytes that this many equal jobs share. Raises as the dry run does."""
    rest = spec.training.micro_batch_size * (group_size - 1)
    others = replace(spec, training=replace(spec.training, micro_batch_size=rest))

    def of_two(config: Path, *_: object) -> tuple[ActivationBytes, ...]:
        # As many tokens as of all, and two adapters: a dry run with sixteen takes minutes.
        return measure(config, (spec, others), ((0, 1),))

    together = memory_together(config, [spec] * group_size, [job] * group_size, of_two)
    return shared_bytes(job.estimate(job.training), together, group_size)


def _with_shared(fit: MemoryFit, find: Callable[[], int]) -> MemoryFit:
    """The same with the shared bytes, which an earlier prepare may have found."""
    found = None if fit.measured is None else fit.measured.shared_bytes
    try:
        shared = find() if found is None else found
    except DryRunFailed as failure:
        remark = "; ".join(filter(None, (fit.status.message, f"the memory of the whole group is unknown: {failure}")))
        return dataclasses.replace(fit, status=replace(fit.status, message=remark[:MAX_MESSAGE_LENGTH]))
    measured = None if fit.measured is None else replace(fit.measured, shared_bytes=shared)
    return dataclasses.replace(fit, status=replace(fit.status, shared_bytes=shared), measured=measured)


def _settings(step: Advice) -> str:
    return " and ".join(f"spec.{change.setting}: {change.proposed}" for change in step.changes)


def memory_to_offload(job: MeasuredJob, gpu_gib: float) -> int | None:
    """Return the GiB of each pod that fits the GPU with the inputs of its blocks in host memory, or None."""
    training = job.training
    if training.recomputed_blocks is not None or training.offloads_inputs or training.micro_batch_size > 1:
        return None
    offloaded = job.estimate(dataclasses.replace(training, offloads_inputs=True))
    needed = pod_memory_for_inputs(job.estimate(training), offloaded, job.spec.resources.gpus)
    return math.ceil(needed / GIB) if needed and verdict(offloaded, gpu_gib) == "fits" else None


def _remedy(job: MeasuredJob, gpu_gib: float, *, alone: bool) -> str:
    if alone and (memory := memory_to_offload(job, gpu_gib)) is not None:
        return f"set spec.resources.memory: {memory}Gi, to hold the inputs of the blocks in host memory"
    steps = advice(job.estimate, job.training, gpu_gib)
    more = more_gpus(job.estimate, job.training, gpu_gib)
    larger = "use a larger GPU"
    if more is not None:
        larger = f"set {_settings(more)} ({more.expected / GIB:.1f} GiB on each), or {larger}"
    if not steps and job.training.fixed >= RUN_FIELDS:
        return "use a larger GPU: a job with spec.continues cannot change these settings"
    if not steps:
        return f"{larger} or a smaller model"
    first = steps[0]
    remedy = f"set {_settings(first)}, which makes it {first.expected / GIB:.1f} GiB"
    if first.verdict == "fits":
        return remedy
    if steps[-1].verdict != "exceeds":
        return f"{remedy}, and more (`qlora plan` lists all), or {larger}"
    return f"{remedy}; no setting is enough, so {larger} or a smaller model"
