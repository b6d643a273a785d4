"""The training loop: steps, evaluations and checkpoints until the run's end."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_api.printable import first_line
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import Interrupted, damaged, is_out_of_gpu_memory
from qlora_trainer.core.filesystem import remove
from qlora_trainer.core.records import timestamp
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.model.adapter.attach import adapter_tensors, recompute_activations
from qlora_trainer.model.losses.batch import Batch, MicroBatch, read_batch
from qlora_trainer.training.checkpoints.attempts import note_time
from qlora_trainer.training.checkpoints.checkpoint import BEST_FILE, Checkpoint, save_checkpoint, write_best
from qlora_trainer.training.distributed.device import free_memory, memory_bytes, peak_memory_bytes, processor, seed_step
from qlora_trainer.training.objective import evaluation_measure
from qlora_trainer.training.optimizer import learning_rate, optimizer_tensors, set_learning_rate
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Gradient, Run, report
from qlora_trainer.training.suspect_run import check_end, check_kept_adapter, check_step, divergence_failure

logger = logging.getLogger(__name__)


def run_to_end(run: Run, state: RunState) -> RunState:
    """Train to the last step or until the run stops early, evaluate and save on the way. Returns the final state.

    Raises Interrupted when a stop is requested, with the latest step saved unless it is suspect; StepFailure (DIVERGED)
    for a loss or gradient that is not finite, before it can reach the weights, and for a run that has diverged.
    """
    state = between_steps(run, state)
    while not is_done(run, state):
        state = between_steps(run, _optimizer_step(run, state))
    return state


def is_done(run: Run, state: RunState) -> bool:
    """Whether the run is at its end, with all that is due there."""
    return run.has_ended(state) and not _is_evaluation_due(run, state)


def between_steps(run: Run, state: RunState) -> RunState:
    """Evaluate and save as due before the next step. Raises as `run_to_end` does.

    Training goes on while the checkpoint is written. Before a run ends, it has been read back.
    """
    run.saver.collect()
    if run.base_check is not None:
        run.base_check.raise_failure()
    if run.eval_data is not None and _is_evaluation_due(run, state) and not run.is_stopping():
        state = _evaluate(run, state, run.eval_data)
    # Asked once: a stop between saving and raising would lose the steps since the last checkpoint.
    stopping = run.is_stopping()
    if _is_save_due(run, state, stopping):
        # No run may resume from training on other bytes: every node has read the base.
        if run.base_check is not None:
            run.base_check.wait()
        run.ranks.wait()
        _save(run, state)
    if stopping or is_done(run, state):
        run.saver.wait()
    if stopping and not is_done(run, state):
        # The step to resume from is earlier if the last ones are suspect.
        report(run, replace(state, step=run.progress.checkpoint_step or 0), "interrupted")
        # The launcher of the ranks may end the others when the first one has ended.
        run.ranks.wait()
        raise Interrupted(state.step, run.progress.schedule.total_steps, run.progress.checkpoint_step or 0)
    return state


def _is_evaluation_due(run: Run, state: RunState) -> bool:
    if run.eval_data is None or state.evaluated_step == state.step:
        return False
    every = run.training.eval_every_steps
    return state.step in (0, run.progress.schedule.total_steps) or (every is not None and state.step % every == 0)


def _is_save_due(run: Run, state: RunState, stopping: bool) -> bool:
    """Whether to save now. A suspect run is saved at its end only."""
    if state.step == 0 or state.step == run.progress.save_step:
        return False
    if run.has_ended(state):
        return True
    every = run.training.save_every_steps
    passed = state.step // every > (run.progress.save_step or 0) // every
    return (passed or stopping) and not state.stability.is_suspect


@dataclass(frozen=True)
class StepCost:
    """The seconds and the bytes of a step, of all runs that have made it together."""

    seconds: float
    peak_memory_bytes: int
    memory_bytes: int

    @classmethod
    def from_device(cls, seconds: float, device: Device) -> Self:
        """Return the cost of a step, and begin to measure that of the next."""
        # In this order: the second starts to look for a new peak.
        return cls(seconds, peak_memory_bytes(device), memory_bytes(device))


def _optimizer_step(run: Run, state: RunState) -> RunState:
    started = run.runtime.monotonic()
    gradient = _gradient(run, state)
    while gradient is None:
        # The step has reached no weight.
        run.optimizer.zero_grad(set_to_none=True)
        if run.is_stopping():
            return state
        state = _recompute(run, state) if _can_recompute(run) else _halve_micro_batches(run, state)
        gradient = _gradient(run, state)
    state = apply_gradient(run, state, gradient)
    return note_step(run, state, gradient, StepCost.from_device(run.runtime.monotonic() - started, run.job.device))


def apply_gradient(run: Run, state: RunState, gradient: Gradient) -> RunState:
    """Clip, check and apply the next step's gradients. Raises as `run_to_end` does."""
    training = run.training
    norm = nn.utils.clip_grad_norm_(run.parameters.values(), training.max_grad_norm)
    (loss, *measured), grad_norm = gradient.means.tolist(), float(norm)
    rate = learning_rate(state.step, run.progress.schedule.total_steps, training)
    named = dict(zip(run.objective.measures, measured, strict=True))
    state = replace(state, step=state.step + 1, loss=loss, measured=named, grad_norm=grad_norm, learning_rate=rate)
    if not (isfinite(loss) and isfinite(grad_norm)):
        symptom = f"loss {loss}, gradient norm {grad_norm} at learning rate {rate:.3g}"
        raise divergence_failure(run, state, symptom)
    state = replace(state, stability=check_step(run, state, loss, grad_norm, gradient))
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return state


def note_step(run: Run, state: RunState, gradient: Gradient, cost: StepCost) -> RunState:
    """Note and report the step that led to `state`. Raises as `run_to_end` does."""
    loss, seconds = float(gradient.means[0]), cost.seconds
    run.progress.pace = run.progress.pace.after_step(seconds, gradient.tokens)
    state = replace(
        state,
        kept_seconds=state.kept_seconds + seconds,
        peak_memory_bytes=max(state.peak_memory_bytes, cost.peak_memory_bytes),
    )
    # Which adapter is the best is known only after the last evaluation, which judges it then.
    if state.step == run.progress.schedule.total_steps and run.training.keep != "best":
        check_end(run, state, loss, gradient)
    learned = {"gradNorm": state.grad_norm, "learningRate": state.learning_rate}
    known = {name: value for name, value in learned.items() if value is not None}
    speed = round(gradient.tokens / seconds, 1) if seconds > 0 else 0.0
    used = {"memoryBytes": cost.memory_bytes, "tokensPerSecond": speed}
    run.note({"step": state.step, "loss": loss, **state.measured, **known, **used})
    report(run, state, "training")
    return state


def _gradient(run: Run, state: RunState) -> Gradient | None:
    """Compute the gradients of the next step.

    Returns None to drop it: to stop, or to halve micro batches.
    """
    seed_step(run.progress.schedule.seed, state.step, run.ranks.rank_info.rank)
    micro_batches = run.progress.schedule.micro_batches(state.step)
    share = _share(run, run.data, micro_batches)
    # A batch that does not count lets the other ranks gather a sharded base.
    batches = [(batch, counts) for batch, counts in share if counts or run.ranks.is_sharded]
    # Micro batches differ in targets: dividing by those of the whole step gives every target the same weight.
    counted = [batch for batch, counts in batches if counts]
    of_ranks = run.ranks.gather(sum(map(run.objective.weight, counted)), sum(batch.tokens for batch in counted))
    weight, tokens = max(1, sum(counts[0] for counts in of_ranks)), sum(counts[1] for counts in of_ranks)
    means = torch.zeros(1 + len(run.objective.measures), device=run.device)
    sums = run.ranks.gradient_sums(run.parameters, means)
    run.objective.before("train", micro_batches)
    for left, (batch, counts) in zip(range(len(share))[::-1], share, strict=True):
        has_part = counts or run.ranks.is_sharded
        with nullcontext() if left else sums.during_last_pass():
            short = has_part and not _add_gradients(run, state, batch, counts, weight, means)
            if short:
                # The other ranks wait for sums that this one has no memory to start.
                free_memory(run.device)
        # After the last one, a stop lets the step end. A lost rank is noticed here immediately, and by NCCL's sum after
        # half an hour.
        if run.ranks.any(short or (left > 0 and run.runtime.stop.is_requested)):
            return None
    run.objective.after(run.ranks)
    sums.finish()
    return Gradient(means, weight, tokens, batches)


def _add_gradients(run: Run, state: RunState, batch: Batch, counts: bool, weight: int, means: Tensor) -> bool:
    """Add a micro batch's part of gradients and `means`.

    Returns whether the memory was enough.
    """
    try:
        sums = run.sums(batch)
        (sums.loss * float(counts) / weight).backward()
        means += sums.values() * float(counts) / weight
    except RuntimeError as error:
        if not (is_out_of_gpu_memory(error) and (_can_recompute(run) or _can_halve(run))):
            raise
        logger.warning("step %d ran out of memory and is repeated", state.step + 1, exc_info=True)
        return False
    report(run, state, "training")
    return True


def _share(run: Run, data: PreparedDataset, micro_batches: Sequence[MicroBatch]) -> list[tuple[Batch, bool]]:
    """This rank's batch in each round, with whether it counts."""
    return [(read_batch(data, item, run.device), counts) for item, counts in run.ranks.rounds(micro_batches)]


def _can_recompute(run: Run) -> bool:
    """Whether some activations are still kept, as prepare has chosen."""
    return run.job.may_recompute and run.progress.recomputation.blocks is not None


def _recompute(run: Run, state: RunState) -> RunState:
    """Prepare the same step with activations that are recomputed, which gives the same bits."""
    free_memory(run.device)
    recompute_activations(run.adapted_base)
    run.progress.recomputation = RECOMPUTE_ALL
    logger.warning("all activations are recomputed from here on, as the GPU has no room for them")
    return replace(state, recomputes=True)


def _can_halve(run: Run) -> bool:
    """Whether micro batches may halve. Other ranks would wait in a sharded base."""
    return run.training.auto_micro_batch and run.progress.schedule.micro_batch_size > 1 and not run.ranks.is_sharded


def _halve_micro_batches(run: Run, state: RunState) -> RunState:
    """Prepare the same step in half the micro batch."""
    free_memory(run.device)
    run.progress.schedule = run.progress.schedule.with_micro_batch_size(run.progress.schedule.micro_batch_size // 2)
    state = replace(state, micro_batch_size=run.progress.schedule.micro_batch_size)
    report(run, state, "training", force=True)
    return state


def _evaluate(run: Run, state: RunState, data: PreparedDataset) -> RunState:
    """Mean loss of the held-out rows, given up if a stop is requested."""
    started = run.runtime.monotonic()
    run.model.eval()
    try:
        means = _held_out_means(run, state, data)
        while means is None and not run.is_stopping():
            state = _halve_micro_batches(run, state)
            means = _held_out_means(run, state, data)
    finally:
        run.model.train()
    if means is None:
        return state
    loss, *measured = means
    if not isfinite(loss):
        raise divergence_failure(run, state, f"loss {loss} on the held-out rows")
    seconds = run.runtime.monotonic() - started
    run.progress.pace = run.progress.pace.after_evaluation(seconds)
    named = {evaluation_measure(name): value for name, value in zip(run.objective.measures, measured, strict=True)}
    run.note({"step": state.step, "evalLoss": loss, **named})
    evaluations = state.evaluations.after(state.step, loss, run.training.early_stopping)
    state = replace(
        state,
        evaluated_step=state.step,
        eval_loss=loss,
        eval_measured=named,
        initial_eval_loss=loss if state.step == 0 else state.initial_eval_loss,
        evaluations=evaluations,
        best_measured=named if evaluations.best_step == state.step else state.best_measured,
        at_rungs=(*state.at_rungs, *(((state.step, loss),) if state.step in run.job.rungs else ())),
        kept_seconds=state.kept_seconds + seconds,
    )
    if run.training.keep == "best" and evaluations.best_step == state.step and run.history is not None:
        # The save under way copies the best adapter before this one, and deletes it.
        run.saver.wait()
        run.progress.best = write_best(run.job.workspace.best, adapter_tensors(run.model))
    if run.has_stopped_early(state) or (run.has_ended(state) and run.training.keep == "best"):
        check_kept_adapter(run, state)
    report(run, state, "training", force=True)
    return state


def _held_out_means(run: Run, state: RunState, data: PreparedDataset) -> list[float] | None:
    """Return the loss and measures, None to stop or to halve micro batches."""
    summed = torch.zeros(1 + len(run.objective.measures), dtype=torch.float64, device=run.device)
    weight = 0
    size = run.progress.schedule.micro_batch_size
    batches = [tuple(range(first, min(first + size, len(data)))) for first in range(0, len(data), size)]
    run.objective.before("eval", batches)
    for indices, counts in run.ranks.rounds(batches):
        short = False
        if counts or run.ranks.is_sharded:
            batch = read_batch(data, indices, run.device)
            try:
                with torch.no_grad():
                    summed += run.sums(batch).values() * float(counts)
            except RuntimeError as error:
                if not (is_out_of_gpu_memory(error) and _can_halve(run)):
                    raise
                short = True
            weight += run.objective.weight(batch) if counts else 0
        if run.ranks.any(short or run.runtime.stop.is_requested):
            return None
        report(run, state, "evaluating")
    run.objective.after(run.ranks)
    of_all = sum(own for (own,) in run.ranks.gather(weight))
    means: list[float] = (run.ranks.sum(summed) / max(1, of_all)).tolist()
    return means


def _save(run: Run, state: RunState) -> None:
    """Copy the run and begin to write it. Only the main process does, while the other ranks continue."""
    report(run, state, "saving a checkpoint")
    now = run.runtime.now()
    run.progress.save_step = state.step
    if run.history is None:
        run.progress.checkpoint_step, run.progress.checkpoint_time = state.step, timestamp(now)
        return
    # The one before may hold the best adapter, which this one copies.
    run.saver.wait()
    epoch, sequence = run.progress.schedule.position(state.step)
    save = partial(
        _write,
        run.job.workspace.checkpoints,
        state.step,
        {
            "adapter": adapter_tensors(run.model),
            "optimizer": optimizer_tensors(run.optimizer, run.parameters),
            **({"objective": objective} if (objective := run.objective.state()) else {}),
        },
        {
            "fingerprint": run.job.fingerprint,
            "threads": run.threads,
            "computeType": run.compute_type,
            "processor": processor(run.job.device),
            "run": asdict(state),
            "data": {"epoch": epoch, "sequence": sequence},
            "historyBytes": run.history.sync(),
            "savedAt": timestamp(now),
        },
        {} if run.progress.best is None else {BEST_FILE: run.progress.best},
    )
    run.saver.start(save, partial(_note_saved, run, now))


def _write(folder: Path, step: int, *content: Any) -> Checkpoint:
    """Save a checkpoint as `save_checkpoint` does, with errors that name it."""
    try:
        return save_checkpoint(folder, step, *content)
    except ValueError as error:
        raise damaged(
            f"the checkpoint of step {step} does not read back ({first_line(error)}): check the volume; the "
            "checkpoints before it are kept"
        ) from error
    except OSError as error:
        # It is raised at a later step.
        reason = f"{error.strerror or error} in the checkpoint of step {step}"
        raise OSError(error.errno, reason, error.filename) from error


def _note_saved(run: Run, began: datetime, saved: Checkpoint) -> None:
    """Note and report a checkpoint that holds the run as it was at `began`."""
    progress = run.progress
    # The checkpoint holds it now; the one that held it before may be gone.
    progress.best = saved.best
    remove(run.job.workspace.best)
    note_time(run.job.workspace.records, run.job.identity.pod_uid, "saved_at", began)
    progress.checkpoint_step, progress.checkpoint_time = saved.step, timestamp(began)
    report(run, progress.reported, "training", force=True)
