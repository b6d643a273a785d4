"""Trains the adapter: the loop, from the prepared data and the base model to the trained folder."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from qlora_api.contract import ProgressRecord
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.completion import Comparison, PrepareRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.core.failures import StopRequest, bad_configuration, unreachable
from qlora_trainer.core.file_names import ADAPTER_FILE, SAMPLES_FILE
from qlora_trainer.core.filesystem import atomic_folder, file_sha256
from qlora_trainer.core.records import RecordWriter, timestamp
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter, save_adapter
from qlora_trainer.model.base import load_base
from qlora_trainer.model.base_weights import BaseWeights
from qlora_trainer.model.merge import keep_for_merge
from qlora_trainer.model.quantized import Storage, is_kept, layers_sha256, quantized_layers, storage_of
from qlora_trainer.model.support import inspect_family
from qlora_trainer.report.metrics_log import MetricsLog
from qlora_trainer.report.trackers import open_trackers
from qlora_trainer.training.answers import leave_samples
from qlora_trainer.training.attempts import counted_attempt, only_attempt
from qlora_trainer.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from qlora_trainer.training.device import use_device
from qlora_trainer.training.fingerprint import Fingerprint, digest, refuse_other_run, run_fingerprint
from qlora_trainer.training.held_out import compared_sequences, mean_loss, read_compared
from qlora_trainer.training.launch import RankInfo, started_others
from qlora_trainer.training.loop import restore, run_to_end
from qlora_trainer.training.optimizer import PAGING_NEEDS_GPU, make_optimizer
from qlora_trainer.training.out_of_memory import explained_shortage
from qlora_trainer.training.ranks import Ranks, joined
from qlora_trainer.training.schedule import Schedule
from qlora_trainer.training.sharding import STORAGE_DTYPE, shard_base
from qlora_trainer.training.state import Run, RunState, report

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
    """Train, from the newest checkpoint if there is one, and leave the adapter in `trained/`.

    `now` gives the time for records (with a time zone), `monotonic` seconds for speeds. `command` starts the same step
    as a further process, for a job with several GPUs that torchrun has not started. Returns at once if the completion
    record matches. Raises StepFailure, or Interrupted after saving when `stop` was set.
    """
    workspace = context.workspace
    prepared = read_completion(workspace.completion("prepare"), PrepareRecord)
    if prepared is None:
        raise bad_configuration(f"{workspace.completion('prepare')} is missing: run the prepare step first")
    model_folder = workspace.root / prepared.model_path
    place = RankInfo.of(os.environ, context.spec.resources.gpus)
    fingerprint = run_fingerprint(context.spec, prepared, context.device, place.size)
    done = _already_trained(context, digest(fingerprint))
    if done is not None:
        return done
    with ExitStack() as held:
        checkpoint = held.enter_context(_attempt(context, fingerprint, now)) if place.main else None
        others = held.enter_context(started_others(place, command))
        ranks = held.enter_context(joined(others, context.device, context.spec.training.sharding))
        checkpoint = _same_start(ranks, context, digest(fingerprint), checkpoint)
        shortage = partial(explained_shortage, context.spec, prepared, model_folder, context.device)
        with shortage(lambda: context.spec.training.micro_batch_size):
            run, state = _start(context, records, stop, now, monotonic, prepared, fingerprint, checkpoint, ranks)
        if run.history is not None:
            held.enter_context(run.history)
        with shortage(lambda: run.plan.micro_batch_size):
            state = run_to_end(run, state)
        # What may need memory now is the comparison, which takes one sequence at a time.
        with shortage(lambda: 1):
            record = _finish(run, state, digest(fingerprint)) if ranks.main else None
        ranks.wait()
        if record is not None:
            _leave_samples(run, model_folder)
    return record or _written_by_main(context, digest(fingerprint))


@contextmanager
def _attempt(context: StepContext, fingerprint: Fingerprint, now: Clock) -> Iterator[Checkpoint | None]:
    """Run the body as the workspace's only attempt, with the checkpoint that it goes on from."""
    workspace = context.workspace
    with only_attempt(workspace.records):
        checkpoint = newest_checkpoint(workspace.checkpoints)
        if checkpoint is not None:
            refuse_other_run(checkpoint.state["fingerprint"], fingerprint, checkpoint.path)
        from_step = 0 if checkpoint is None else checkpoint.step
        with counted_attempt(workspace.records, from_step, context.spec.retry.max_disruptions, context.pod_uid, now):
            yield checkpoint


def _same_start(
    ranks: Ranks, context: StepContext, fingerprint: str, checkpoint: Checkpoint | None
) -> Checkpoint | None:
    """The checkpoint that the main process has chosen. Raises StepFailure if this process would compute another run."""
    chosen = "" if checkpoint is None else checkpoint.path.name
    said_fingerprint, _, said_name = ranks.from_main("start", f"{fingerprint} {chosen}").partition(" ")
    if said_fingerprint != fingerprint:
        raise bad_configuration(
            f"rank {ranks.place.rank} has another job, other data or other libraries than rank 0: start all processes "
            "with the same image, document and workspace"
        )
    if ranks.main or not said_name:
        return checkpoint
    return read_checkpoint(context.workspace.checkpoints / said_name)


def _written_by_main(context: StepContext, fingerprint: str) -> TrainRecord:
    record = _already_trained(context, fingerprint)
    if record is None:
        raise unreachable("the main process has finished, but its adapter is not in this process's workspace")
    return record


def _already_trained(context: StepContext, fingerprint: str) -> TrainRecord | None:
    """The completion record, if it is of this run and the adapter is still what it says."""
    record = read_completion(context.workspace.completion("train"), TrainRecord)
    if record is None or record.fingerprint != fingerprint:
        return None
    adapter = context.workspace.root / record.adapter_path / ADAPTER_FILE
    if context.spec.output.merged is not None and not is_kept(context.workspace.quantized, record.quantized_sha256):
        return None
    return record if adapter.is_file() and file_sha256(adapter) == record.adapter_sha256 else None


def _start(
    context: StepContext,
    records: RecordWriter,
    stop: StopRequest,
    now: Clock,
    monotonic: Callable[[], float],
    prepared: PrepareRecord,
    fingerprint: Fingerprint,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> tuple[Run, RunState]:
    """Load everything and put it where the checkpoint left it; without one, at the beginning."""
    spec, root = context.spec, context.workspace.root
    own_cpus = max(1, available_cpus() // ranks.place.local_size)
    threads = own_cpus if checkpoint is None else int(checkpoint.state["threads"])
    device = use_device(context.device, threads, ranks.place.local_rank)
    data = PreparedDataset.open(root / prepared.data_path, "train")
    eval_data = PreparedDataset.open(root / prepared.data_path, "eval") if spec.dataset.eval else None
    plan = Schedule.of(len(data), spec.training)
    _say_loading(context, records, now, 0 if checkpoint is None else checkpoint.step, plan.total_steps)
    model_folder = root / prepared.model_path
    _refuse_mixed_rows(spec, prepared, model_folder)
    base, storage, quantized_sha256 = _load_base(context, model_folder, ranks)
    loftq = spec.lora.initialization == "loftq" and checkpoint is None
    model = attach_adapter(
        base,
        spec.lora,
        prepared.target_modules,
        seed=spec.training.seed,
        gradient_checkpointing=spec.training.gradient_checkpointing,
        base_name=context.base_name,
        base_revision=prepared.model_revision,
        original=BaseWeights(model_folder, base) if loftq else None,
    )
    if ranks.sharded:
        shard_base(model, device, ranks.place.size)
    run = Run(
        context=context,
        records=records,
        stop=stop,
        now=now,
        monotonic=monotonic,
        device=device,
        plan=plan,
        data=data,
        eval_data=eval_data,
        model=model,
        optimizer=make_optimizer(adapter_parameters(model).values(), spec.training),
        ranks=ranks,
        history=_history(context, fingerprint, checkpoint) if ranks.main else None,
        fingerprint=fingerprint,
        threads=threads,
        storage=storage,
        quantized_sha256=quantized_sha256,
    )
    state = RunState() if checkpoint is None else restore(run, checkpoint)
    ranks.copy_from_main(run.parameters.values())
    unpaged = context.device == "cpu" and spec.training.optimizer != "adamw"
    report(run, state, PAGING_NEEDS_GPU if unpaged else "training", force=True)
    return run, state


def _say_loading(context: StepContext, records: RecordWriter, now: Clock, step: int, total_steps: int) -> None:
    """What takes minutes, with the step from which the run will go on."""
    records.progress(
        ProgressRecord(
            job_uid=context.job_uid,
            pod_uid=context.pod_uid,
            step="train",
            time=timestamp(now()),
            activity="loading the base model in 4 bit",
            training_step=step,
            total_steps=total_steps,
        ),
        force=True,
    )


def _load_base(context: StepContext, model_folder: Path, ranks: Ranks) -> tuple[Any, Storage, str]:
    """The base in 4 bit, what it takes, and the SHA-256 of that. It is kept on disk if it will be merged into."""
    # A base that is to be spread may be larger than the GPU: it goes there block by block.
    if ranks.sharded:
        base = load_base(model_folder, context.spec.quantization, "cpu", STORAGE_DTYPE)
    else:
        base = load_base(model_folder, context.spec.quantization, context.device)
    storage, sha256 = storage_of(base), layers_sha256(quantized_layers(base))
    if context.spec.output.merged is not None and ranks.main:
        keep_for_merge(base, model_folder, context.workspace, sha256)
    return base, storage, sha256


def _history(context: StepContext, fingerprint: Fingerprint, checkpoint: Checkpoint | None) -> MetricsLog:
    """The run's metrics, on disk and for the tools that the job names; they go on where the checkpoint was saved."""
    spec, folder = context.spec, context.workspace.report
    trackers = open_trackers(
        spec.training.report_to,
        folder,
        run_name=context.document.metadata.name,
        run_id=digest(fingerprint)[:16],
        settings={"model": spec.model.source, **spec.lora.dump(), **spec.training.dump()},
        from_step=0 if checkpoint is None else checkpoint.step,
    )
    return MetricsLog(folder, 0 if checkpoint is None else int(checkpoint.state["historyBytes"]), trackers)


def _refuse_mixed_rows(spec: QLoRAJobSpec, prepared: PrepareRecord, model_folder: Path) -> None:
    """A micro batch puts rows into one forward pass even without packing: its family must keep them apart."""
    if spec.training.micro_batch_size == 1 or prepared.packed:
        return
    family = inspect_family(model_folder, spec.lora)
    if not family.keeps_rows_apart(spec.training.max_sequence_length):
        raise bad_configuration(
            f"model_type {family.model_type!r} cannot keep the rows of a batch apart: set "
            "spec.training.microBatchSize to 1 and raise gradientAccumulationSteps instead"
        )


def _finish(run: Run, state: RunState, fingerprint: str) -> TrainRecord:
    """Write the adapter, then the completion record that points at it."""
    workspace = run.context.workspace
    with atomic_folder(workspace.trained) as folder:
        save_adapter(run.model, folder)
    if state.loss is None or run.history is None:
        raise AssertionError("a plan has at least one step, each step has a loss, and the main process notes it")
    run.history.sync()
    record = TrainRecord(
        fingerprint=fingerprint,
        adapter_path=workspace.trained.name,
        adapter_sha256=file_sha256(workspace.trained / ADAPTER_FILE),
        training_step=state.step,
        loss=state.loss,
        initial_eval_loss=state.initial_eval_loss,
        eval_loss=state.eval_loss,
        peak_memory_bytes=state.peak_memory_bytes,
        ranks=run.ranks.place.size,
        micro_batch_size=state.micro_batch_size,
        quantized_parameters=run.storage.parameters,
        bits_per_parameter=round(run.storage.bits_per_parameter, 4),
        quantized_layers=run.storage.layers,
        quantized_sha256=run.quantized_sha256,
        compared=_compared(run),
    )
    write_completion(workspace.completion("train"), record)
    return record


def _compared(run: Run) -> Comparison | None:
    """The adapter's loss on the rows that a merged model will be tried on; None if there will be none."""
    if run.eval_data is None or run.context.spec.output.merged is None:
        return None
    model = run.model.eval().get_base_model()
    sequences = compared_sequences(run.eval_data, run.storage.parameters)
    batches = read_compared(run.eval_data, sequences, run.device, together=False)
    targets = sum(batch.target_count for batch in batches)
    return Comparison(sequences=sequences, targets=targets, loss=mean_loss(model, batches))


def _leave_samples(run: Run, tokenizer_folder: Path) -> None:
    """What the model says without and with the adapter, for the report."""
    path = run.context.workspace.report / SAMPLES_FILE
    # One process alone cannot pass through a sharded base.
    count = 0 if run.ranks.sharded else run.context.spec.training.samples
    data = run.eval_data or run.data
    leave_samples(path, run.model, tokenizer_folder, data, count, lambda: run.stop.requested, run.device)
