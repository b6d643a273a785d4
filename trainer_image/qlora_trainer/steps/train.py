"""Trains the adapter: load, loop, finish."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qlora_api import contract
from qlora_api.gate import GateSpec
from qlora_trainer.core.completion import (
    Comparison,
    PrepareRecord,
    TrainRecord,
    read_completion,
    score_settings,
    write_completion,
)
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.core.failures import StopRequest, bad_configuration
from qlora_trainer.core.file_names import ADAPTER_FILE, SAMPLES_FILE
from qlora_trainer.core.filesystem import atomic_folder, file_sha256
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter, restore_adapter, save_adapter
from qlora_trainer.model.attention import ATTENTION
from qlora_trainer.model.base import load_base
from qlora_trainer.model.base_weights import BaseWeights
from qlora_trainer.model.cache import require_whole_in_cache
from qlora_trainer.model.initial_adapter import read_initial_adapter
from qlora_trainer.model.storage import storage_of
from qlora_trainer.model.support import cannot_keep_rows_apart
from qlora_trainer.report.metrics_log import MetricsLog
from qlora_trainer.report.trackers import open_trackers
from qlora_trainer.training.answers import AnswerTexts, leave_samples
from qlora_trainer.training.attempts import PodOfJob, read_attempts
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.best_adapter import read_best
from qlora_trainer.training.checkpoint import Checkpoint
from qlora_trainer.training.device import use_device
from qlora_trainer.training.evaluations import Kept, kept
from qlora_trainer.training.fingerprint import Fingerprint, digest, run_fingerprint
from qlora_trainer.training.held_out import compare
from qlora_trainer.training.launch import RankInfo, started_child_ranks
from qlora_trainer.training.loop import run_to_end
from qlora_trainer.training.optimizer import PAGING_NEEDS_GPU, make_optimizer
from qlora_trainer.training.out_of_memory import explained_shortage
from qlora_trainer.training.preference import make_objective
from qlora_trainer.training.ranks import Meeting, Ranks, joined
from qlora_trainer.training.resume import agreed_checkpoint, restore, resumed_attempt
from qlora_trainer.training.schedule import Schedule
from qlora_trainer.training.scoring import measure_score
from qlora_trainer.training.sharding import STORAGE_DTYPE, shard_base
from qlora_trainer.training.state import Run, RunState, Runtime, report

Clock = Callable[[], datetime]


def train(
    context: StepContext,
    records: RecordWriter,
    *,
    stop: StopRequest,
    now: Clock,
    monotonic: Callable[[], float],
    command: Sequence[str] = (),
) -> TrainRecord:
    """Train, from the newest checkpoint if there is one, and write the adapter to `trained/`.

    `now` gives the time for records (with a time zone), `monotonic` seconds for speeds. `command` starts the same step
    as a further process, for a job with several GPUs that torchrun has not started. Returns at once if the completion
    record matches. Raises StepFailure, or Interrupted after saving when `stop` was set.
    """
    prepared = _prepared(context)
    require_whole_in_cache(context.workspace.root / prepared.base_path, context.mounts.model_cache)
    rank_info = RankInfo.of(os.environ, context.spec.resources)
    job = _Job(context, prepared, run_fingerprint(context.spec, prepared, context.device, rank_info.size))
    done = _already_trained(context, job.digest)
    if done is not None:
        return done
    with ExitStack() as held, ExitStack() as together:
        checkpoint = held.enter_context(_attempt(job, now)) if rank_info.main else None
        child_ranks = together.enter_context(started_child_ranks(rank_info, command))
        meeting = _meeting(job, rank_info, Runtime(records, stop, now, monotonic))
        ranks = together.enter_context(joined(child_ranks, context.device, context.spec.training.sharding, meeting))
        checkpoint = agreed_checkpoint(ranks, job.digest, checkpoint, context.workspace.checkpoints)
        shortage = partial(
            explained_shortage,
            context.spec,
            prepared.target_modules,
            job.model_folder,
            context.device,
            measured=prepared.measured,
        )
        # One process of each node reads the files again, which the others map from the same memory.
        base_check = BaseCheck(job.base_folder, prepared.base_sha256) if rank_info.local_rank == 0 else None
        if base_check is not None:
            held.callback(base_check.close)
        with shortage(lambda: context.spec.training.micro_batch_size):
            run, state = _load(job, Runtime(records, stop, now, monotonic), ranks, checkpoint, base_check)
        if run.history is not None:
            held.enter_context(run.history)
        with shortage(lambda: run.schedule.micro_batch_size):
            state = run_to_end(run, state)
        if base_check is not None:
            base_check.wait()
        # Each node has read the base.
        ranks.wait()
        # All that still needs GPU memory is the comparison, which takes one sequence at a time.
        with shortage(lambda: 1):
            record = _finish(run, state, job) if ranks.main else None
        # Not read from the workspace, where another node may see the file only after a while.
        record = _agreed_record(ranks, record)
        ranks.wait()
        # However the others end from here on, the adapter is written.
        together.close()
        if ranks.main:
            record = _with_score(run, state, job, record)
            _leave_samples(run, job)
    return record


@dataclass(frozen=True)
class _Job:
    """What this process is to train, known before anything is loaded."""

    context: StepContext
    prepared: PrepareRecord
    fingerprint: Fingerprint

    @property
    def model_folder(self) -> Path:
        """The base model's configuration and tokenizer, and the original weights if they are kept."""
        return self.context.workspace.root / self.prepared.model_path

    @property
    def base_folder(self) -> Path:
        """The base model in 4-bit."""
        return self.context.workspace.root / self.prepared.base_path

    def texts(self) -> AnswerTexts:
        """What turns tokens into answers."""
        return AnswerTexts(self.model_folder, self.prepared.end_of_turn)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the fingerprint."""
        return digest(self.fingerprint)


def _prepared(context: StepContext) -> PrepareRecord:
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    if record is None:
        raise bad_configuration(f"{path} is missing or of another release: run the prepare step first")
    return record


def _already_trained(context: StepContext, fingerprint: str) -> TrainRecord | None:
    """The completion record, if it is of this run, with its score, and the adapter still has the recorded sum."""
    record = read_completion(context.workspace.completion("train"), TrainRecord)
    if record is None or record.fingerprint != fingerprint or not _has_score(record, context.spec.gate):
        return None
    adapter = context.workspace.root / record.adapter_path / ADAPTER_FILE
    return record if adapter.is_file() and file_sha256(adapter) == record.adapter_sha256 else None


def _has_score(record: TrainRecord, gate: GateSpec | None) -> bool:
    """Whether the record has the score that the job asks for."""
    if gate is None or gate.score is None:
        return True
    return record.score is not None and record.score.settings == score_settings(gate.score)


def _agreed_record(ranks: Ranks, record: TrainRecord | None) -> TrainRecord:
    """The completion record, which the main process passes and the others get."""
    text = ranks.from_main("trained", "" if record is None else record.model_dump_json())
    return record or TrainRecord.model_validate_json(text)


def _meeting(job: "_Job", rank_info: RankInfo, runtime: Runtime) -> Meeting:
    """How this process meets the others: in several pods, for as long as the profile says."""
    if not rank_info.several_nodes or contract.ENV_NODE not in os.environ:
        return Meeting(stopped=lambda: runtime.stop.requested)
    context = job.context

    def report_waiting(activity: str) -> None:
        runtime.records.progress(context.progress("train", runtime.now(), activity))

    return Meeting(
        seconds=float(os.environ.get(contract.ENV_NODE_WAIT, contract.DEFAULT_NODE_WAIT_SECONDS)),
        incarnation=context.pod_uid,
        stopped=lambda: runtime.stop.requested,
        report=report_waiting,
    )


def _attempt(job: _Job, now: Clock) -> AbstractContextManager[Checkpoint | None]:
    context = job.context
    pod = PodOfJob(context.pod_uid, context.attempt, context.started or now())
    return resumed_attempt(context.workspace, job.fingerprint, pod, now)


def _load(
    job: _Job, runtime: Runtime, ranks: Ranks, checkpoint: Checkpoint | None, base_check: BaseCheck | None
) -> tuple[Run, RunState]:
    """Load everything, in the state that the checkpoint saved; without one, at step 0."""
    context, spec, prepared = job.context, job.context.spec, job.prepared
    threads = _own_threads(ranks.rank_info) if checkpoint is None else int(checkpoint.state["threads"])
    device = use_device(context.device, threads, ranks.rank_info.local_rank)
    data_folder = context.workspace.root / prepared.data_path
    data = PreparedDataset.open(data_folder, "train")
    eval_data = PreparedDataset.open(data_folder, "eval") if spec.dataset.eval else None
    schedule = Schedule.of(len(data), spec.training, data.epoch_offsets)
    from_step = 0 if checkpoint is None else checkpoint.step
    _say_loading(context, runtime.records, runtime.now, from_step, schedule.total_steps)
    if spec.training.micro_batch_size > 1 and not prepared.packed and not prepared.rows_apart:
        raise cannot_keep_rows_apart(prepared.model_type)
    base = _load_base(job, ranks.sharded)
    storage = storage_of(base)
    model = _attach_adapter(base, job, device, initialized=checkpoint is None)
    if ranks.sharded:
        shard_base(model, device, ranks.rank_info.size)
    run = Run(
        context=context,
        runtime=runtime,
        ranks=ranks,
        device=device,
        data=data,
        eval_data=eval_data,
        model=model,
        optimizer=make_optimizer(adapter_parameters(model).values(), spec.training),
        objective=make_objective(spec.training, data, eval_data, device),
        history=_open_history(job, checkpoint) if ranks.main else None,
        fingerprint=job.fingerprint,
        threads=threads,
        storage=storage,
        base_check=base_check,
        initial_adapter_sha256=None if prepared.initial_adapter is None else prepared.initial_adapter.sha256,
        attempts=read_attempts(context.workspace.records) if ranks.main else (),
        schedule=schedule,
    )
    state = RunState() if checkpoint is None else restore(run, checkpoint)
    ranks.copy_from_main(run.parameters.values())
    unpaged = context.device == "cpu" and spec.training.optimizer != "adamw"
    report(run, state, PAGING_NEEDS_GPU if unpaged else "training", force=True)
    return run, state


def _own_threads(rank_info: RankInfo) -> int:
    """This rank's share of the pod's CPU cores."""
    return max(1, available_cpus() // rank_info.local_size)


def _say_loading(context: StepContext, records: RecordWriter, now: Clock, step: int, total_steps: int) -> None:
    """Report what takes minutes, with the step from which the run resumes."""
    activity = "loading the base model in 4-bit"
    loading = context.progress("train", now(), activity, training_step=step, total_steps=total_steps)
    records.progress(loading, force=True)


def _load_base(job: _Job, sharded: bool) -> Any:
    quantization, attention = job.context.spec.quantization, job.prepared.attention or ATTENTION
    # A base that is to be sharded may be larger than the GPU: shard_base moves it there block by block.
    if sharded:
        return load_base(job.base_folder, quantization, "cpu", STORAGE_DTYPE, attention)
    return load_base(job.base_folder, quantization, job.context.device, attention=attention)


def _attach_adapter(base: Any, job: _Job, device: torch.device, *, initialized: bool) -> Any:
    """The base with the job's adapter: initialized, on the device or with an earlier one, or to be restored.

    Each rank initializes it: the others cannot wait for one longer than `ranks.TIMEOUT`, which a large model may take.
    """
    spec = job.context.spec
    from_original = initialized and spec.lora.initialization == "loftq"
    model = attach_adapter(
        base,
        spec.lora,
        job.prepared.target_modules,
        seed=spec.training.seed,
        gradient_checkpointing=spec.training.gradient_checkpointing,
        base_name=job.context.base_name,
        base_revision=job.prepared.model_revision,
        original=BaseWeights(job.model_folder, base) if from_original else None,
        device=device,
    )
    if initialized and job.prepared.initial_adapter is not None:
        folder = job.context.workspace.initial_adapter
        restore_adapter(model, read_initial_adapter(folder, job.prepared.initial_adapter.sha256))
    return model


def _open_history(job: _Job, checkpoint: Checkpoint | None) -> MetricsLog:
    """The run's metrics, on disk and for the trackers that the job names, continued from the checkpoint."""
    spec, folder = job.context.spec, job.context.workspace.report
    trackers = open_trackers(
        spec.training.report_to,
        folder,
        run_name=job.context.document.metadata.name,
        run_id=job.digest[:16],
        settings={"model": spec.model.source, **spec.lora.dump(), **spec.training.dump()},
        from_step=0 if checkpoint is None else checkpoint.step,
    )
    return MetricsLog(folder, 0 if checkpoint is None else int(checkpoint.state["historyBytes"]), trackers)


def _finish(run: Run, state: RunState, job: _Job) -> TrainRecord:
    """Write the adapter, then the completion record that points at it."""
    workspace = run.context.workspace
    chosen = kept(run.training, state.evaluations, state.step, state.eval_loss)
    _put_into_model(run, state, chosen)
    with atomic_folder(workspace.trained) as folder:
        save_adapter(run.model, folder)
    if state.loss is None or run.history is None:
        raise AssertionError("a plan has at least one step, each step has a loss, and the main process notes it")
    run.history.sync()
    record = TrainRecord(
        fingerprint=job.digest,
        adapter_path=workspace.trained.name,
        adapter_sha256=file_sha256(workspace.trained / ADAPTER_FILE),
        training_step=state.step,
        total_steps=run.schedule.total_steps,
        adapter_step=chosen.step,
        loss=state.loss,
        initial_eval_loss=state.initial_eval_loss,
        eval_loss=chosen.eval_loss,
        eval_tokens=None if run.eval_data is None else run.eval_data.target_tokens,
        peak_memory_bytes=state.peak_memory_bytes,
        ranks=run.ranks.rank_info.size,
        micro_batch_size=state.micro_batch_size,
        quantized_parameters=run.storage.parameters,
        bits_per_parameter=round(run.storage.bits_per_parameter, 4),
        quantized_layers=run.storage.layers,
        base_sha256=job.prepared.base_sha256,
        compared=_comparison(run),
        attempts=len(run.attempts),
        goodput=run.goodput(state),
    )
    write_completion(workspace.completion("train"), record)
    return record


def _put_into_model(run: Run, state: RunState, chosen: Kept) -> None:
    """Put the adapter that is kept into the model, for all that follows: it may be that of an earlier step."""
    if chosen.step == state.step:
        return
    if run.best is None:
        raise AssertionError("the main process writes the best adapter when it is found, and each checkpoint holds it")
    restore_adapter(run.model, read_best(run.best))


def _comparison(run: Run) -> Comparison | None:
    """The adapter's loss on the rows on which a merged model will be compared with it; None if there will be none."""
    if run.eval_data is None or run.context.spec.output.merged is None:
        return None
    return compare(run.model, run.eval_data, run.storage.parameters, run.device)


def _with_score(run: Run, state: RunState, job: _Job, record: TrainRecord) -> TrainRecord:
    """The completion record, written again with the score of the adapter's answers, if the job asks for that."""
    gate = run.context.spec.gate
    if gate is None or gate.score is None or run.eval_data is None:
        return record
    score = measure_score(run, state, run.eval_data, gate.score, job.texts(), record.adapter_sha256)
    record = record.model_copy(update={"score": score})
    write_completion(run.context.workspace.completion("train"), record)
    return record


def _leave_samples(run: Run, job: _Job) -> None:
    path = run.context.workspace.report / SAMPLES_FILE
    # One rank alone cannot run a sharded base.
    count = 0 if run.ranks.sharded else run.training.samples
    data, stop = run.eval_data or run.data, run.runtime.stop
    leave_samples(path, run.model, job.texts, data, count, lambda: stop.requested, run.device)
