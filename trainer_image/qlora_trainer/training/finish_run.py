"""Finishes a run: writes the kept adapter, the record, what its gate measures, and samples."""

from functools import partial

from qlora_api.printable import first_line
from qlora_api.schema import replace
from qlora_trainer.core.completion import TrainRecord, read_completion, write_completion
from qlora_trainer.core.failures import damaged
from qlora_trainer.core.file_names import ADAPTER_FILE, ANSWERS_FILE, SAMPLES_FILE
from qlora_trainer.core.filesystem import atomic_folder, file_sha256, remove
from qlora_trainer.data.prepared import guard_split, open_prepared
from qlora_trainer.evaluation import answers
from qlora_trainer.evaluation.held_out import compare
from qlora_trainer.model.adapter.attach import restore_adapter, save_adapter
from qlora_trainer.training.benchmark_scores import BaseScores, measure_benchmarks
from qlora_trainer.training.checkpoints.attempts import read_attempts
from qlora_trainer.training.checkpoints.time_spent import run_usage
from qlora_trainer.training.guard_losses import BaseLosses, measure_guards
from qlora_trainer.training.progress.evaluations import adapter_to_keep
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run
from qlora_trainer.training.scoring import BaseAnswers, measure_score


def finish_run(run: Run, state: RunState) -> TrainRecord:
    """Write the adapter, then the completion record that points at it."""
    job, workspace = run.job, run.job.workspace
    chosen = adapter_to_keep(run.training, state.evaluations, state.step, state.eval_loss)
    if chosen.step != state.step:
        _restore_best(run)
    with atomic_folder(workspace.trained) as folder:
        save_adapter(run.model, folder)
    if state.loss is None or run.history is None:
        raise AssertionError("a plan has at least one step, each step has a loss, and the main process notes it")
    run.history.sync()
    compared = None
    if run.eval_data is not None and job.spec.output.merged is not None:
        compared = compare(run.model, run.eval_data, run.storage.parameters, run.device)
    sha256 = file_sha256(workspace.trained / ADAPTER_FILE)
    earlier = read_completion(workspace.completion("train"), TrainRecord)
    record = TrainRecord(
        fingerprint=job.digest,
        adapter_path=workspace.trained.name,
        adapter_sha256=sha256,
        training_step=state.step,
        total_steps=run.progress.schedule.total_steps,
        adapter_step=chosen.step,
        loss=state.loss,
        initial_eval_loss=state.initial_eval_loss,
        eval_loss=chosen.eval_loss,
        eval_accuracy=(state.eval_measured if chosen.step == state.step else state.best_measured).get("evalAccuracy"),
        eval_tokens=None if run.eval_data is None else run.eval_data.target_tokens,
        peak_memory_bytes=state.peak_memory_bytes,
        ranks=run.ranks.rank_info.size,
        micro_batch_size=state.micro_batch_size,
        compute_type=run.compute_type,
        quantized_parameters=run.storage.parameters,
        bits_per_parameter=round(run.storage.bits_per_parameter, 4),
        quantized_layers=run.storage.layers,
        base_sha256=job.prepared.base_sha256,
        compared=compared,
        # An attempt that was stopped while it measured them continues there.
        benchmarks=() if earlier is None or earlier.adapter_sha256 != sha256 else earlier.benchmarks,
        attempts=len(run.attempts),
        goodput=run.goodput(state),
        usage=run_usage(read_attempts(workspace.records), run.ranks.rank_info.size, run.runtime.now()),
    )
    write_completion(workspace.completion("train"), record)
    # One that was found after the last checkpoint was saved is in no checkpoint, and is needed no more.
    remove(workspace.best)
    return record


def _restore_best(run: Run) -> None:
    """Put the best adapter, of an earlier step, into the model for all that follows."""
    best = run.progress.best
    if best is None:
        raise AssertionError("the main process writes the best adapter when it is found, and each checkpoint holds it")
    try:
        restore_adapter(run.model, best.tensors())
    except (ValueError, KeyError) as error:
        raise damaged(f"the best adapter cannot be kept ({first_line(error)}): check the volume") from error


def add_guards(run: Run, state: RunState, record: TrainRecord, base_losses: BaseLosses) -> TrainRecord:
    """The record, written again with the losses on the rows of guards if the job has any.

    Before any answer is generated, which leaves the model unfit for packed rows.
    """
    if not run.job.spec.guards:
        return record
    record = replace(record, guards=measure_guards(run, state, record.adapter_sha256, base_losses))
    write_completion(run.job.workspace.completion("train"), record)
    return record


def add_scores(run: Run, state: RunState, record: TrainRecord, base_answers: BaseAnswers) -> TrainRecord:
    """The record, written again with the scores of the answers if the job asks for them."""
    job, gate = run.job, run.job.spec.gate
    if gate is None or gate.score is None or run.eval_data is None:
        return record
    measure = partial(measure_score, run, state, gate.score, record.adapter_sha256, base_answers)
    score, guards = measure(run.eval_data, ANSWERS_FILE), list(record.guards)
    for number, (guard, measured) in enumerate(zip(job.spec.guards, record.guards, strict=True)):
        if guard.min_score is not None:
            data = open_prepared(job.data_folder, guard_split(guard.name))
            guards[number] = replace(measured, score=measure(data, f"answers-{guard.name}.jsonl"))
    record = replace(record, score=score, guards=tuple(guards))
    write_completion(job.workspace.completion("train"), record)
    return record


def add_benchmarks(run: Run, state: RunState, record: TrainRecord, base_scores: BaseScores) -> TrainRecord:
    """The record, written again with the scores of each benchmark that the job asks for."""
    if not run.job.spec.benchmarks:
        return record
    for measured in measure_benchmarks(run, state, record, base_scores):
        record = replace(record, benchmarks=(*record.benchmarks, measured))
        write_completion(run.job.workspace.completion("train"), record)
    return record


def write_samples(run: Run) -> None:
    """Write sample answers for the report. The model must not be trained afterwards."""
    job, stop = run.job, run.runtime.stop
    answers.leave_samples(
        job.workspace.report / SAMPLES_FILE,
        run.model,
        job.texts,
        run.eval_data or run.data,
        # One rank alone cannot run a sharded base.
        0 if run.ranks.is_sharded else run.training.samples,
        lambda: stop.is_requested,
        run.device,
        fixed_positions=job.prepared.fixed_positions,
    )
