"""Runs this trainer: its prepare step, then its train step under the meter."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import ALPHA, RANK, Case, Workload
from benchmarks.speed.settings import LEARNING_RATE, MAX_GRAD_NORM, SEED
from benchmarks.trainer import prepared_context, train_here


def train(case: Case, workload: Workload, folder: Path, model: Path) -> dict[str, Any]:
    """Train; returns the measurement, with the estimate of the memory that PyTorch allocates."""
    training = {
        "maxSteps": workload.steps + 1,
        "microBatchSize": case.micro_batch,
        "gradientAccumulationSteps": case.accumulation,
        "gradientCheckpointing": case.recompute,
        "maxSequenceLength": workload.max_length,
        "optimizer": "adamw",
        "learningRate": LEARNING_RATE,
        "scheduler": "constant",
        "maxGradNorm": MAX_GRAD_NORM,
        # As the others: every token is trained on, and no checkpoint and no sample written.
        "trainOn": "all",
        "saveEverySteps": 10_000,
        "samples": 0,
        "seed": SEED,
    }
    context = prepared_context(folder, model, training, {"rank": RANK, "alpha": ALPHA}, device=workload.device)
    # They load PyTorch, whose settings are in the environment from here on.
    from benchmarks.gpu.meter import Meter
    from benchmarks.speed.ours import useful
    from qlora_trainer.model.memory.fit import training_shape
    from qlora_trainer.model.memory.job_memory import measured_estimate
    from qlora_trainer.training.prepared_job import PreparedJob

    job = PreparedJob.from_workspace(context, ranks=1)
    if job.prepared.measured is None:
        raise AssertionError("prepare has measured the job's memory")
    estimate = measured_estimate(
        job.prepared.measured, training_shape(job.spec, job.prepared.target_modules, job.recomputation)
    )
    meter = Meter(workload)
    meter.install()
    train_here(context)
    # PyTorch's allocator does not see CUDA's context.
    return meter.result(useful(context)[0]) | {"estimateBytes": estimate.expected - estimate.context}
