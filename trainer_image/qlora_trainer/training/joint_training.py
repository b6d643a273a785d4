"""Trains several runs on one base: the micro batches of all runs go through the model in the same pass.

Each run has its own adapter, optimizer, schedule, evaluations and checkpoints, and computes what it computes alone, up
to the rounding of the base's matmuls, whose order of additions depends on how many tokens are multiplied at once.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from qlora_trainer.core.failures import Interrupted, StepFailure, is_out_of_gpu_memory
from qlora_trainer.core.outcome import ENDS_ONE_JOB, as_failure
from qlora_trainer.model.losses.batch import Batch, read_batch
from qlora_trainer.model.losses.joint import joint_losses, route
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.training.distributed.device import free_memory
from qlora_trainer.training.loop import StepCost, apply_gradient, between_steps, is_done, note_step
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Gradient, Run, report

logger = logging.getLogger(__name__)


@dataclass
class Member:
    """One of the runs that share a base, by the name of its adapter in the model."""

    adapter: str
    run: Run
    state: RunState


Ended = RunState | StepFailure
"""How a run ended: its final state, or why it failed."""


def run_together(members: Sequence[Member]) -> Iterator[tuple[Member, Ended]]:
    """Train all members to their ends, which may be at different steps, and give each as it ends.

    A member that fails, also because its files cannot be read or written, does not stop the others. Raises Interrupted
    when a stop is requested, after every member that still trains has been saved as alone.
    """
    training, apart = list(members), False
    while training:
        interrupted: list[Interrupted] = []
        for member in tuple(training):
            try:
                member.state = between_steps(member.run, member.state)
            except Interrupted as stop:
                interrupted.append(stop)
                continue
            except ENDS_ONE_JOB as error:
                training.remove(member)
                yield member, as_failure(error)
                _leave(member)
                continue
            if is_done(member.run, member.state):
                training.remove(member)
                yield member, member.state
                _leave(member)
        if interrupted and len(interrupted) < len(training):
            # The stop came between two of them: those before it are not saved yet.
            continue
        if interrupted:
            raise interrupted[0]
        ended, apart = _step(training, apart=apart)
        for failed in ended:
            training.remove(failed[0])
            yield failed
            _leave(failed[0])


def _leave(member: Member) -> None:
    """Free what only training needs, and return the model to training mode."""
    member.run.optimizer.zero_grad(set_to_none=True)
    member.run.optimizer.state.clear()
    member.run.model.train()


_Failed = list[tuple[Member, StepFailure]]


def _step(members: Sequence[Member], *, apart: bool) -> tuple[_Failed, bool]:
    """One optimizer step of each member. Returns those that failed, and whether to keep the passes of members apart."""
    if not members:
        return [], apart
    first, applied = members[0].run, list[tuple[Member, Gradient]]()
    started = first.runtime.monotonic()
    shares: dict[str, _Share] = {}
    failed: _Failed = []
    for member in members:
        run = member.run
        try:
            micro_batches = run.progress.schedule.micro_batches(member.state.step)
            batches = [read_batch(run.data, item, run.device) for item in micro_batches]
            weight = max(1, sum(map(run.objective.weight, batches)))
            shares[member.adapter] = _Share(member, batches, weight, torch.zeros(1, device=run.device))
        except ENDS_ONE_JOB as error:
            failed.append((member, as_failure(error)))
    gradients: list[tuple[Member, Gradient]] | None = None
    try:
        gradients = _gradients(shares, failed, apart=apart)
    except RuntimeError as error:
        if apart or len(shares) < 2 or not is_out_of_gpu_memory(error):
            raise
        logger.warning("the jobs' joint pass ran out of memory: each goes on in passes of its own", exc_info=True)
    # Not in the clause above, whose exception keeps tensors of the pass.
    if gradients is None:
        apart = True
        _drop(shares)
        free_memory(first.device)
        gradients = _gradients(shares, failed, apart=True)
    for member, gradient in gradients:
        try:
            member.state = apply_gradient(member.run, member.state, gradient)
            applied.append((member, gradient))
        except ENDS_ONE_JOB as error:
            failed.append((member, as_failure(error)))
    cost = StepCost.from_device(first.runtime.monotonic() - started, first.job.device)
    for member, gradient in applied:
        try:
            member.state = note_step(member.run, member.state, gradient, cost)
        except ENDS_ONE_JOB as error:
            failed.append((member, as_failure(error)))
    return failed, apart


@dataclass
class _Share:
    """A member's part of a step."""

    member: Member
    batches: list[Batch]
    weight: int
    """What its losses are divided by."""
    means: torch.Tensor
    """float32 [1] on the device: the loss so far."""

    def gradient(self) -> Gradient:
        """The results of the step, once all batches have passed."""
        tokens = sum(batch.tokens for batch in self.batches)
        return Gradient(self.means, self.weight, tokens, [(batch, True) for batch in self.batches])


def _drop(shares: Mapping[str, _Share]) -> None:
    """Drop the gradients of a step that has reached no weight."""
    for share in shares.values():
        share.member.run.optimizer.zero_grad(set_to_none=True)
        share.means.zero_()


def _gradients(shares: dict[str, _Share], failed: _Failed, *, apart: bool) -> list[tuple[Member, Gradient]]:
    """Compute the gradients of the members' next steps.

    Returns none if a stop drops these steps. Adds members whose files cannot be written to `failed`. `apart`: in a pass
    for each member.
    """
    longest = max((len(share.batches) for share in shares.values()), default=0)
    for number in range(longest):
        present = {name: share.batches[number] for name, share in shares.items() if number < len(share.batches)}
        if not present:
            break
        for part in [{name: batch} for name, batch in present.items()] if apart else [present]:
            _pass(shares, part)
        if number + 1 < longest and next(iter(shares.values())).member.run.is_stopping():
            _drop(shares)
            return []
        for name, share in tuple(shares.items()):
            try:
                report(share.member.run, share.member.state, "training")
            except OSError as error:
                del shares[name]
                failed.append((share.member, as_failure(error)))
    return [(share.member, share.gradient()) for share in shares.values()]


def _pass(shares: Mapping[str, _Share], batches: Mapping[str, Batch]) -> None:
    """Add the gradients of these members' batches, in one pass of the model."""
    run = shares[next(iter(batches))].member.run
    with route(run.adapted_base, batches):
        with computing(run.adapted_base, run.device.type):
            losses = joint_losses(run.adapted_base, batches)
        means = {name: loss / shares[name].weight for name, loss in losses.items()}
        torch.stack(list(means.values())).sum().backward()
    for name, mean in means.items():
        shares[name].means += mean.detach()
