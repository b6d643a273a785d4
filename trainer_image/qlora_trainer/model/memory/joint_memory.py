"""The GPU memory of jobs together on one base, from the table or a dry run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_api.memory.estimate import ActivationBytes, MemoryEstimate, estimate_together
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.model.memory.dry_run import measure_together_within_limits
from qlora_trainer.model.memory.job_memory import JobMemory, MeasuredJob, TableJob, measured_together

MeasurePasses = Callable[[Path, Sequence[QLoRAJobSpec], Sequence[tuple[int, ...]]], tuple[ActivationBytes, ...]]
"""Measures passes of some of the jobs, given by their numbers."""


def memory_together(
    config: Path,
    specs: Sequence[QLoRAJobSpec],
    alone: Sequence[JobMemory],
    measure: MeasurePasses = measure_together_within_limits,
) -> MemoryEstimate:
    """The peak of jobs trained together, whose model has this config.json. `alone` is that of each.

    Raises as the dry run does, which is made unless the table has all jobs.
    """
    trainings = [job.training for job in alone]
    in_table = [job for job in alone if isinstance(job, TableJob)]
    if len(in_table) == len(alone):
        return estimate_together(in_table[0].model, trainings)
    measured = [
        job if isinstance(job, MeasuredJob) else MeasuredJob.from_config(config, spec, job.training)
        for spec, job in zip(specs, alone, strict=True)
    ]
    everyone = tuple(range(len(trainings)))
    accumulating = tuple(number for number in everyone if trainings[number].gradient_accumulation_steps > 1)
    passes = sorted({everyone, accumulating} - {()}, key=len)
    found = dict(zip(map(len, passes), measure(config, specs, passes), strict=True))

    def activations(passing: Sequence[TrainingShape]) -> ActivationBytes:
        return found[len(passing)]

    return measured_together([(job.measured, job.training) for job in measured], activations)
