"""Measures a finished adapter and its base by the benchmarks of its gate."""

from collections.abc import Iterator

from qlora_api.spec.gate import BenchmarkSpec
from qlora_trainer.core.completion import BenchmarkRecord, TrainRecord
from qlora_trainer.core.failures import Interrupted
from qlora_trainer.evaluation.answers import Answering
from qlora_trainer.evaluation.benchmarks import HarnessModel, open_benchmarks
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run, report
from qlora_trainer.training.scoring import answer_texts

BaseScores = dict[tuple[str, str, int, str], float]
"""The base's scores by task, metric, rows and checksum of the tasks, for jobs that share a base in memory."""


def measure_benchmarks(
    run: Run, state: RunState, record: TrainRecord, base_scores: BaseScores
) -> Iterator[BenchmarkRecord]:
    """Yield the scores of each benchmark that `record` lacks, once it is measured. Adds to `base_scores`.

    Raises Interrupted when a stop is requested, StepFailure for a task that cannot be run.
    """
    run.optimizer.state.clear()
    missing = [spec for spec in run.job.spec.benchmarks if not any(found.is_of(spec) for found in record.benchmarks)]
    # It switches the model to the attention that answers one token at a time.
    tokenizer = Answering(run.model, answer_texts(run.job), lambda: False, run.device).texts.tokenizer
    with open_benchmarks(run.job.tasks, missing) as benchmarks:
        for spec in missing:
            key = (spec.task, spec.metric, spec.rows, benchmarks.sha256)
            if key not in base_scores:
                base_scores[key], _ = benchmarks.measure(spec, _model(run, state, spec, has_adapter=False), tokenizer)
            adapter, rows = benchmarks.measure(spec, _model(run, state, spec, has_adapter=True), tokenizer)
            yield BenchmarkRecord(
                task=spec.task,
                metric=spec.metric,
                limit=spec.rows,
                tasks_sha256=benchmarks.sha256,
                adapter_sha256=record.adapter_sha256,
                rows=rows,
                adapter=adapter,
                base=base_scores[key],
            )


def require_benchmarks(job: PreparedJob) -> None:
    """Read the rows of the job's benchmarks. Raises StepFailure for a task that cannot be run, before training."""
    specs = job.spec.benchmarks
    if specs:
        with open_benchmarks(job.tasks, specs) as benchmarks:
            for spec in specs:
                benchmarks.load(spec)


def _model(run: Run, state: RunState, spec: BenchmarkSpec, *, has_adapter: bool) -> HarnessModel:
    activity = f"benchmark {spec.task} {'with' if has_adapter else 'without'} the adapter"

    def report_or_stop() -> None:
        if run.runtime.stop.is_requested:
            raise Interrupted(state.step, run.progress.schedule.total_steps, run.progress.checkpoint_step or 0)
        report(run, state, activity)

    return HarnessModel(run.model, run.device, has_adapter, report_or_stop)
