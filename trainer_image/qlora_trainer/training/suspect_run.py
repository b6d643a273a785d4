"""Compares a suspect run with the model before its first step, and may end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.adapter.attach import activate_adapter, adapter_tensors, restore_adapter
from qlora_trainer.model.adapter.initial import read_initial_adapter
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.divergence import Stability, has_diverged
from qlora_trainer.training.progress.evaluations import adapter_to_keep
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Gradient, Run

logger = logging.getLogger(__name__)


@contextmanager
def as_at_start(run: Run) -> Iterator[None]:
    """In the body the model computes as at step 0: as the base alone, or with the adapter of spec.lora.from.

    The trained adapter is put back to the last bit. Raises StepFailure if the earlier one has changed.
    """
    if run.job.initial_adapter_sha256 is None:
        try:
            with run.model.disable_adapter():
                yield
        finally:
            # PEFT gives gradients back to the active adapter only.
            activate_adapter(run.adapted_base, run.adapter)
        return
    initial = read_initial_adapter(run.job.workspace.initial_adapter, run.job.initial_adapter_sha256)
    trained = adapter_tensors(run.model)
    restore_adapter(run.model, initial)
    try:
        yield
    finally:
        restore_adapter(run.model, trained)


def start_name(job: PreparedJob) -> str:
    """Name the model at step 0, for messages."""
    if job.initial_adapter_sha256 is None:
        return "the base model without the adapter"
    return "the adapter of spec.lora.from"


def check_step(run: Run, state: RunState, loss: float, grad_norm: float, gradient: Gradient) -> Stability:
    """The stability after this step. Raises StepFailure (DIVERGED) if that ends it."""
    patience = run.training.divergence_patience
    if patience == 0:
        return state.stability
    stability = state.stability.after_step(state.step, loss, grad_norm)
    if not stability.is_out_of_patience(state.step, patience):
        return stability
    start = start_name(run.job)
    with as_at_start(run):
        loss_at_start = _loss_without_gradient(run, gradient)
    if not has_diverged(loss, loss_at_start):
        logger.info("step %d: loss %.4f is high, but %s has %.4f", state.step, loss, start, loss_at_start)
        return Stability.from_levels(loss, grad_norm)
    raise divergence_failure(
        run,
        replace(state, stability=stability),
        f"loss {loss:.4g} and gradient norm {grad_norm:.3g}, suspect since step {stability.suspect_since} (before, the "
        f"loss had come down to {stability.lowest_loss_level:.4g}); {start} has {loss_at_start:.4g} on the "
        "same rows",
    )


def check_end(run: Run, state: RunState, loss_before: float, gradient: Gradient) -> None:
    """Check the last step's effect on the loss of its rows: no later one shows it."""
    if run.training.divergence_patience == 0:
        return
    loss = _loss_without_gradient(run, gradient)
    if not state.stability.is_end_suspect(loss_before, loss):
        return
    with as_at_start(run):
        loss_at_start = _loss_without_gradient(run, gradient)
    if has_diverged(loss, loss_at_start):
        raise divergence_failure(
            run,
            state,
            f"loss {loss:.4g} with the finished adapter on the rows of the last step ({loss_before:.4g} before it); "
            f"{start_name(run.job)} has {loss_at_start:.4g} (spec.training.divergencePatience: 0 would publish it)",
        )


def check_kept_adapter(run: Run, state: RunState) -> None:
    """Check the kept adapter on held-out rows at the end: no later step shows harm."""
    loss = adapter_to_keep(run.training, state.evaluations, state.step, state.eval_loss).eval_loss
    before = state.initial_eval_loss
    if run.training.divergence_patience == 0 or loss is None or before is None or not has_diverged(loss, before):
        return
    raise divergence_failure(
        run,
        state,
        f"the run would {'stop early' if run.has_stopped_early(state) else 'end'} with loss {loss:.4g} on the held-out "
        f"rows ({before:.4g} before training; spec.training.divergencePatience: 0 would publish it)",
    )


def divergence_failure(run: Run, state: RunState, symptom: str) -> StepFailure:
    """Return the failure of a run that has diverged at this state, with its symptom."""
    try:
        run.saver.wait()
    except (OSError, StepFailure):
        logger.exception("the checkpoint that was being saved is not complete")
    step = run.progress.checkpoint_step
    saved = f"the checkpoint of step {step} is kept" if step else "nothing was saved yet"
    if step and step + 1 == state.stability.suspect_since:
        saved += " (that step may already have diverged; the checkpoint before it has not)"
    return StepFailure(
        ExitCode.DIVERGED,
        f"training diverged at step {state.step}: {symptom}; {saved}. Lower spec.training.learningRate or set "
        "warmupSteps, and look for broken rows",
    )


def _loss_without_gradient(run: Run, gradient: Gradient) -> float:
    """Mean loss of the step, of all ranks."""
    run.model.eval()
    try:
        with torch.no_grad():
            losses = [run.sums(batch).loss * float(counts) for batch, counts in gradient.batches]
            summed = torch.stack(losses).sum() if losses else torch.zeros((), device=run.device)
            return float(run.ranks.sum(summed)) / gradient.weight
    finally:
        run.model.train()
