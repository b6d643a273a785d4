"""Trains the adapter: load, loop, finish."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from functools import partial

from qlora_api import contract
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import Identity, StepContext
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.steps.sweep_curves import leaving_curves
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.benchmark_scores import require_benchmarks
from qlora_trainer.training.distributed.launch import RankInfo, start_child_ranks
from qlora_trainer.training.distributed.meeting import Meeting, join_ranks
from qlora_trainer.training.finish_run import add_benchmarks, add_guards, add_scores, finish_run, write_samples
from qlora_trainer.training.loop import run_to_end
from qlora_trainer.training.open_run import ProcessSettings, open_run
from qlora_trainer.training.out_of_memory import explain_shortage
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.run import Runtime


def train(
    context: StepContext,
    records: RecordWriter,
    *,
    stop: StopRequest,
    now: Callable[[], datetime],
    monotonic: Callable[[], float],
    command: Sequence[str] = (),
) -> TrainRecord:
    """Train, from the newest checkpoint if there is one, and write the adapter to `trained/`.

    `now` gives the time for records (with a time zone), `monotonic` seconds for speeds. `command` starts the same step
    as a further process, for a job with several GPUs that torchrun has not started. Returns early if the completion
    record matches. Raises StepFailure, or Interrupted after saving when `stop` was set.
    """
    rank_info = RankInfo.from_environment(os.environ, context.spec.resources)
    job = PreparedJob.from_workspace(context, rank_info.size)
    done = job.read_train_record()
    if done is not None:
        return done
    if rank_info.is_main:
        require_benchmarks(job)
    with ExitStack() as held, ExitStack() as together:
        checkpoint = held.enter_context(job.attempt(now)) if rank_info.is_main else None
        child_ranks = together.enter_context(start_child_ranks(rank_info, command))
        runtime = Runtime(records, stop, now, monotonic)
        meeting = _meeting(context.identity, rank_info, runtime)
        ranks = together.enter_context(join_ranks(child_ranks, context.device, context.spec.training.sharding, meeting))
        checkpoint = job.agree_on_checkpoint(ranks, checkpoint)
        shortage = partial(
            explain_shortage,
            job.spec,
            job.prepared.target_modules,
            context.device,
            measured=job.prepared.measured,
        )
        # One process of each node reads the files again, which the others map from the same memory.
        base_check = BaseCheck(job.base_folder, job.prepared.base_sha256) if rank_info.local_rank == 0 else None
        if base_check is not None:
            held.callback(base_check.close)
        with shortage(lambda: job.spec.training.micro_batch_size, lambda: job.recomputation):
            run, state = open_run(job, ProcessSettings(runtime, ranks, base_check), checkpoint)
        if run.history is not None:
            held.enter_context(run.history)
        held.enter_context(run.saver)
        leaving = leaving_curves(job, context.mounts.sweep) if ranks.is_main else nullcontext()
        with shortage(lambda: run.progress.schedule.micro_batch_size, lambda: run.progress.recomputation), leaving:
            state = run_to_end(run, state)
        if base_check is not None:
            base_check.wait()
        # Each node has read the base.
        ranks.wait()
        # All that still needs GPU memory is the comparison, which takes one sequence at a time.
        with shortage(lambda: 1, lambda: run.progress.recomputation):
            record = finish_run(run, state) if ranks.is_main else None
        # Not read from the workspace, where another node may see the file only after a while.
        text = ranks.broadcast_text("trained", "" if record is None else record.model_dump_json())
        record = record or TrainRecord.model_validate_json(text)
        ranks.wait()
        # However the others end from here on, the adapter is written.
        together.close()
        if ranks.is_main:
            with shortage(lambda: 1, lambda: run.progress.recomputation):
                record = add_guards(run, state, record, {})
            record = add_scores(run, state, record, {})
            with shortage(lambda: 1, lambda: run.progress.recomputation):
                record = add_benchmarks(run, state, record, {})
            write_samples(run)
    return record


def _meeting(identity: Identity, rank_info: RankInfo, runtime: Runtime) -> Meeting:
    """How this process meets those of other pods, with the profile's time limit."""
    if not rank_info.has_several_nodes or contract.ENV_NODE not in os.environ:
        return Meeting(stopped=lambda: runtime.stop.is_requested)

    def report_waiting(activity: str) -> None:
        runtime.records.progress(identity.progress("train", runtime.now(), activity))

    return Meeting(
        seconds=float(os.environ.get(contract.ENV_NODE_WAIT, contract.DEFAULT_NODE_WAIT_SECONDS)),
        incarnation=identity.pod_uid,
        stopped=lambda: runtime.stop.is_requested,
        report=report_waiting,
    )
