"""What the attempts of a run took, and how much of it no checkpoint holds, for the report."""

from collections.abc import Sequence
from datetime import datetime

from qlora_trainer.core.completion import AttemptUsage, RunUsage
from qlora_trainer.training.attempts import Attempt

_LISTED = 50


def run_usage(attempts: Sequence[Attempt], gpus: int, now: datetime) -> RunUsage:
    """The time of all attempts, the last of which has just trained to its end. `gpus`: processes of each.

    The time before a process starts, as for pulling its image, is not known here: `status.usage` has it.
    """
    starts = [datetime.fromisoformat(attempt.started_at) for attempt in attempts]
    listed = [
        _usage(attempt, latest, last=number == len(attempts))
        for number, (attempt, latest) in enumerate(zip(attempts, [*starts, now][1:], strict=True), 1)
    ]
    return RunUsage(
        gpus=gpus,
        count=len(listed),
        seconds=round(sum(each.seconds for each in listed), 1),
        startup_seconds=round(sum(each.startup_seconds or 0.0 for each in listed), 1),
        lost_seconds=round(sum(each.lost_seconds for each in listed), 1),
        attempts=tuple(listed[-_LISTED:]),
    )


def _usage(attempt: Attempt, latest: datetime, *, last: bool) -> AttemptUsage:
    """`latest`: by when it had ended."""
    start = datetime.fromisoformat(attempt.started_at)
    end = latest if attempt.ended_at is None else datetime.fromisoformat(attempt.ended_at)
    seconds = max(0.0, (end - start).total_seconds())

    def after(moment: str | None) -> float | None:
        if moment is None:
            return None
        return min(seconds, max(0.0, (datetime.fromisoformat(moment) - start).total_seconds()))

    startup, saved = after(attempt.trained_at), after(attempt.saved_at)
    kept = seconds if last else max(filter(None, (startup, saved)), default=0.0)
    return AttemptUsage(
        started_at=attempt.started_at,
        from_step=attempt.from_step,
        seconds=round(seconds, 1),
        startup_seconds=None if startup is None else round(startup, 1),
        lost_seconds=round(seconds - kept, 1),
        ended="succeeded" if last else attempt.ended,
    )
