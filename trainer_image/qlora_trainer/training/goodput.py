"""Goodput: the share of the train pods' time that is in the adapter.

Only the trainer can tell which steps an interruption undoes. Each checkpoint holds the seconds of its steps, so lost
steps leave the count with the checkpoint that they never reached. Pulling images, starting containers and up to five
seconds of a killed process are not counted: the share is slightly too high.
"""

from collections.abc import Sequence
from datetime import datetime

from qlora_trainer.training.attempts import Attempt


def spent_seconds(attempts: Sequence[Attempt], now: datetime) -> float:
    """Seconds for which the attempts have run; the last of them, if it has not ended, until `now`.

    Of an attempt that was killed the last sign of life counts as its end. One whose end nobody has recorded, as by an
    earlier release, ended at the latest when the next one started. Without any, as in all but the main process of a
    run, 0.
    """
    starts = [datetime.fromisoformat(attempt.started_at) for attempt in attempts]
    seconds = 0.0
    for attempt, start, latest in zip(attempts, starts, [*starts, now][1:], strict=True):
        end = latest if attempt.ended_at is None else datetime.fromisoformat(attempt.ended_at)
        seconds += max(0.0, (end - start).total_seconds())
    return seconds


def goodput(kept_seconds: float, spent: float) -> float | None:
    """Share from 0 to 1 of `spent` seconds; None before a second of them has passed.

    `kept_seconds`: of the optimizer steps and evaluations that no interruption has undone. The clocks of two machines
    may differ, so that the quotient would exceed 1.
    """
    return None if spent < 1 else round(min(1.0, kept_seconds / spent), 4)
