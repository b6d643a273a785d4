"""Reasons and messages of a sweep's conditions."""

from qlora_api.status import MAX_SHORT_TEXT_LENGTH
from qlora_api.sweep.status import BestCell, QLoRASweepStatus, SweepPhase
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.sweeps.best_cell import waits_for_publication
from qlora_operator.decisions.sweeps.sweep import QLoRASweep


def reason_of_all(status: QLoRASweepStatus) -> Reason:
    """The end of a sweep whose result is the adapter of each cell."""
    cells = len(status.cells)
    if status.succeeded == cells:
        return Reason("Succeeded", f"{cells} of {cells} cells have succeeded: status.cells has their adapters")
    deleted = [line.name for line in status.cells if line.phase == "Deleted"]
    failed = [line.name for line in status.cells if line.phase not in ("Succeeded", "Deleted")]
    counts = [f"{len(failed)} of {cells} cells have failed{_reasons(status)}"] if failed else []
    counts += [f"{len(deleted)} of {cells} cells were deleted before their end"] if deleted else []
    parts = [" and ".join(counts)]
    parts += ["status.cells has the adapters of the others"] if status.succeeded else []
    # The names are last: a long message loses its end.
    parts += [f"spec.retry.request of a failed cell's QLoRAJob retries it: {', '.join(failed)}"] if failed else []
    parts += [f"deleted: {', '.join(deleted)}"] if deleted else []
    return Reason("CellsFailed", "; ".join(parts))


def _reasons(status: QLoRASweepStatus) -> str:
    """List the reasons of failed cells in parentheses, empty if none has one."""
    words = sorted({line.reason for line in status.cells if line.reason and line.phase == "Failed"})
    return f" ({', '.join(words)[:MAX_SHORT_TEXT_LENGTH]})" if words else ""


def reason_of_the_best(status: QLoRASweepStatus) -> Reason:
    """The end of a sweep whose result is its best adapter."""
    failed = f"; {status.failed} of {len(status.cells)} cells have failed" if status.failed else ""
    failed += f"; {status.stopped} were stopped" if status.stopped else ""
    if not status.succeeded:
        found = f"none of the {len(status.cells)} cells has succeeded{_reasons(status)}"
        sentence = f"{found}: the condition Failed of each reports why"
        if status.stopped:
            sentence += (
                f"; {status.stopped} were stopped, and can be resumed from their checkpoints by spec.suspend: false of "
                "their QLoRAJobs"
            )
        return Reason("AllCellsFailed", sentence)
    best = status.best
    if best is None:
        return Reason("Succeeded", f"no cell has a loss or score to compare (spec.best){failed}")
    score = "" if best.score is None else f", score {best.score}"
    return Reason(
        "Succeeded",
        f"the best is {best.cell} ({best.overrides}) with loss {best.eval_loss} on the held-out rows{score}, its "
        f"adapter is at {_place(status, best)}{failed}",
    )


def _place(status: QLoRASweepStatus, best: BestCell) -> str:
    found = status.published
    return found.adapter if found is not None and found.cell == best.cell and found.adapter else best.adapter


def reason_to_continue(
    sweep: QLoRASweep, status: QLoRASweepStatus, phase: SweepPhase, held_back: Reason | None
) -> Reason:
    """Why the sweep has not ended."""
    if phase == "Suspended":
        return Reason("Suspended", "spec.suspend is true; false resumes the sweep")
    if sweep.spec.suspend:
        return Reason("Suspending", "the cells that run save a checkpoint and stop")
    if held_back is not None:
        return held_back
    if waits_for_publication(sweep, status) and (found := status.published) is not None:
        if found.message:
            sentence = f"QLoRAJob {found.name}, which is to publish the adapter of {found.cell}, waits: {found.message}"
            return Reason(found.reason, sentence)
        return Reason("Running", f"QLoRAJob {found.name} publishes the adapter of {found.cell}")
    done, all_ = status.succeeded + status.failed + status.stopped, len(status.cells)
    return Reason("Running" if phase == "Running" else "Pending", f"{done} of {all_} cells have ended")
