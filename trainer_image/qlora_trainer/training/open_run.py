"""Opens a job's run: base, adapter, data and optimizer, as a checkpoint saved it."""

import logging
from dataclasses import dataclass
from typing import cast

import torch

from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.printable import first_line
from qlora_trainer.core.context import Device, base_name
from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.core.environment import available_cpus
from qlora_trainer.core.failures import bad_configuration, damaged
from qlora_trainer.core.records import timestamp
from qlora_trainer.data.prepared import PreparedDataset, open_prepared
from qlora_trainer.history.metrics_log import MetricsLog
from qlora_trainer.history.trackers import EventFiles
from qlora_trainer.model.adapter.attach import (
    adapter_parameters,
    attach_adapter,
    recompute_activations,
    restore_adapter,
)
from qlora_trainer.model.adapter.initial import read_initial_adapter
from qlora_trainer.model.base.load import Storage, load_base, storage_of
from qlora_trainer.model.experts.loading import StoredExperts
from qlora_trainer.model.families.family import cannot_keep_rows_apart
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.protocols import AdaptedModel, Decoder
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.checkpoints.attempts import note_time, read_attempts
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint
from qlora_trainer.training.checkpoints.saver import CheckpointSaver
from qlora_trainer.training.distributed.device import own_compute_type, processor, require_memory, use_device
from qlora_trainer.training.distributed.launch import RankInfo
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.distributed.sharding import STORAGE_DTYPE, shard_base
from qlora_trainer.training.optimizer import PAGING_NEEDS_GPU, make_optimizer, restore_optimizer
from qlora_trainer.training.preference import make_objective
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run, RunProgress, Runtime, report
from qlora_trainer.training.schedule import Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessSettings:
    """The settings of the process that opens a run."""

    runtime: Runtime
    ranks: Ranks
    base_check: BaseCheck | None
    """Reads the base's files again, in one process of each node."""


@dataclass(frozen=True)
class LoadedBase:
    """The base of a process, which may have adapters already."""

    model: Decoder
    storage: Storage
    device: torch.device
    threads: int
    """CPU threads of this process."""
    compute_type: ComputeType
    unloaded: StoredExperts | None
    """The routed experts of a base that will be sharded, which are loaded then."""


def open_run(job: PreparedJob, process: ProcessSettings, checkpoint: Checkpoint | None) -> tuple[Run, RunState]:
    """Load everything, in the checkpoint's state, or at step 0 without one."""
    base = open_base(job, process, checkpoint, checkpoint)
    model = attach_job_adapter(base, job, initialized=checkpoint is None)
    if base.unloaded is not None:
        shard_base(model, base.device, process.ranks.rank_info.size, base.unloaded)
    return open_on_model(job, process, checkpoint, base, model)


def open_base(
    job: PreparedJob, process: ProcessSettings, checkpoint: Checkpoint | None, begun: Checkpoint | None
) -> LoadedBase:
    """The job's base. The process keeps threads and compute type of the checkpoint `begun`, of this job or one beside.

    Another number or type would make another adapter, however slow this processor is in it.
    Raises StepFailure for a GPU that is too small, or a model that cannot keep rows apart and must train on several.
    """
    spec, prepared, ranks = job.spec, job.prepared, process.ranks
    threads = _own_threads(ranks.rank_info) if begun is None else begun.state.threads
    device = use_device(job.device, threads, ranks.rank_info.local_rank)
    if begun is None and job.device == "cuda":
        can_halve = spec.training.auto_micro_batch and spec.training.micro_batch_size > 1 and not ranks.is_sharded
        require_memory(prepared.memory, torch.cuda.mem_get_info()[1], can_shrink=can_halve or job.may_recompute)
    own_type = _own_compute_type(job.device, ranks)
    compute_type = own_type if begun is None else begun.state.compute_type
    if own_type != compute_type:
        logger.warning("the run goes on in %s, as it began; a new one would be in %s here", compute_type, own_type)
    loading = job.identity.progress(
        "train",
        process.runtime.now(),
        "loading the base model in 4-bit",
        training_step=0 if checkpoint is None else checkpoint.step,
        total_steps=_schedule(job, open_prepared(job.data_folder, "train")).total_steps,
    )
    process.runtime.records.progress(loading, force=True)
    if spec.training.micro_batch_size > 1 and not prepared.packed and not prepared.rows_apart:
        raise cannot_keep_rows_apart(prepared.model_type)
    quantization, attention, unloaded = spec.quantization, prepared.attention or ATTENTION, None
    if ranks.is_sharded:
        # It may be larger than the GPU: shard_base moves it there block by block.
        model = load_base(job.base_folder, quantization, "cpu", STORAGE_DTYPE, attention)
        unloaded = StoredExperts.from_folder(model, job.base_folder, quantization)
    else:
        model = load_base(job.base_folder, quantization, job.device, attention=attention, compute_type=compute_type)
    return LoadedBase(model, storage_of(model), device, threads, compute_type, unloaded)


def _own_compute_type(device: Device, ranks: Ranks) -> ComputeType:
    """Choose by the main process's processor. Others, of other nodes, compute alike.

    A base that is sharded is for GPUs, and its storage is in 16 bit.
    """
    if ranks.is_sharded:
        return "bfloat16"
    return cast("ComputeType", ranks.broadcast_text("compute", own_compute_type(device)))


def _own_threads(rank_info: RankInfo) -> int:
    return max(1, available_cpus() // rank_info.local_size)


def attach_job_adapter(base: LoadedBase, job: PreparedJob, *, initialized: bool) -> AdaptedModel:
    """Attach the job's adapter: initialized, perhaps with another, or to restore."""
    spec = job.spec
    model = attach_adapter(
        base.model,
        spec.lora,
        job.prepared.target_modules,
        seed=spec.training.seed,
        recomputation=job.recomputation,
        base_name=base_name(spec.model),
        base_revision=job.prepared.model_revision,
    )
    if initialized:
        begin_with_earlier(model, job)
    return model


def begin_with_earlier(model: AdaptedModel, job: PreparedJob) -> None:
    """Put the adapter of spec.lora.from into the active one, if the job names one."""
    initial = job.prepared.initial_adapter
    if initial is None:
        return
    folder = job.workspace.initial_adapter
    try:
        restore_adapter(model, read_initial_adapter(folder, initial.sha256))
    except KeyError as error:
        raise damaged(f"{folder} does not fit the job ({first_line(error)}): prepare the job again") from error


def open_on_model(
    job: PreparedJob, process: ProcessSettings, checkpoint: Checkpoint | None, base: LoadedBase, model: AdaptedModel
) -> tuple[Run, RunState]:
    """The run of the model's active adapter, initialized without a checkpoint."""
    spec, records, ranks = job.spec, job.workspace.records, process.ranks
    data = open_prepared(job.data_folder, "train")
    eval_data = open_prepared(job.data_folder, "eval") if spec.dataset.holds_out else None
    run = Run(
        job=job,
        runtime=process.runtime,
        ranks=ranks,
        device=base.device,
        data=data,
        eval_data=eval_data,
        adapted_base=model,
        adapter=model.active_adapter,
        parameters=adapter_parameters(model),
        optimizer=make_optimizer(adapter_parameters(model).values(), spec.training),
        objective=make_objective(spec.training, data, eval_data, base.device),
        history=_open_history(job, checkpoint) if ranks.is_main else None,
        threads=base.threads,
        compute_type=base.compute_type,
        storage=base.storage,
        base_check=process.base_check,
        saver=CheckpointSaver(),
        attempts=read_attempts(records) if ranks.is_main else (),
        progress=RunProgress(_schedule(job, data), job.recomputation),
    )
    state = RunState() if checkpoint is None else _restore(run, checkpoint)
    ranks.copy_from_main(run.parameters.values())
    began = process.runtime.now()
    run.progress.training_since = timestamp(began)
    if ranks.is_main:
        note_time(records, job.identity.pod_uid, "trained_at", began)
    unpaged = job.device == "cpu" and spec.training.optimizer != "adamw"
    report(run, state, PAGING_NEEDS_GPU if unpaged else "training", force=True)
    return run, state


def _restore(run: Run, checkpoint: Checkpoint) -> RunState:
    """Restore all but random state, which each step seeds. Raises StepFailure."""
    try:
        restore_adapter(run.model, checkpoint.tensors("adapter"))
        restore_optimizer(run.optimizer, run.parameters, checkpoint.tensors("optimizer"))
        run.objective.restore(checkpoint.tensors("objective") if checkpoint.has("objective") else {})
    except KeyError as error:
        raise damaged(
            f"{checkpoint.path} does not fit the job ({first_line(error)}): delete that folder, and the job resumes "
            "from the checkpoint before it, or from its first step"
        ) from error
    if checkpoint.state.compute_type != run.compute_type:
        raise bad_configuration(
            f"{checkpoint.path} was computed in {checkpoint.state.compute_type}, and the jobs that train together with "
            f"this one compute in {run.compute_type}: train it alone"
        )
    before, here = checkpoint.state.processor, processor(run.job.device)
    if before != here:
        logger.warning(
            "%s was made on %s, this is %s: the adapter may differ in its last digits", checkpoint.path, before, here
        )
    progress = run.progress
    progress.save_step = progress.checkpoint_step = checkpoint.step
    progress.checkpoint_time = checkpoint.state.saved_at
    progress.best = checkpoint.best
    state = checkpoint.state.run
    if state.recomputes and run.job.may_recompute:
        recompute_activations(run.adapted_base)
        progress.recomputation = RECOMPUTE_ALL
    if state.micro_batch_size is not None:
        progress.schedule = progress.schedule.with_micro_batch_size(state.micro_batch_size)
    return state


def _schedule(job: PreparedJob, data: PreparedDataset) -> Schedule:
    return Schedule.from_training(len(data), job.spec.training, data.epoch_offsets)


def _open_history(job: PreparedJob, checkpoint: Checkpoint | None) -> MetricsLog:
    """Continue the metrics from the checkpoint, for TensorBoard too if asked for."""
    spec, folder = job.spec, job.workspace.report
    step, length = (0, 0) if checkpoint is None else (checkpoint.step, checkpoint.state.history_bytes)
    event_files = None
    if "tensorboard" in spec.training.report_to:
        settings = {"model": spec.model.source, **spec.lora.dump(), **spec.training.dump()}
        event_files = EventFiles(folder / "tensorboard", settings, step)
    return MetricsLog(folder, length, event_files)
