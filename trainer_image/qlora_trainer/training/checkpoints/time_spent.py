"""Measures where the time of a run goes: its pace, its goodput, and what no checkpoint holds.

Only the trainer can count which steps an interruption undoes. Each checkpoint holds the seconds of its steps, so lost
steps leave the count with the checkpoint that they never reached. Pulling images, starting containers and up to five
seconds of a killed process are not counted: the goodput is slightly too high.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from qlora_trainer.core.completion import AttemptUsage, RunUsage
from qlora_trainer.training.checkpoints.attempts import Attempt


def spent_seconds(attempts: Sequence[Attempt], now: datetime) -> float:
    """Seconds that the attempts have run, until `now` if the last has not ended.

    A killed attempt ended at its last sign of life. One without a recorded end, as by an earlier release, ended at the
    latest when the next one started.
    """
    return sum(_seconds(attempt, latest) for attempt, latest in zip(attempts, _latest_ends(attempts, now), strict=True))


def _latest_ends(attempts: Sequence[Attempt], now: datetime) -> list[datetime]:
    """By when each attempt had ended: when the next one started, and now."""
    return [*(datetime.fromisoformat(attempt.started_at) for attempt in attempts[1:]), now][: len(attempts)]


def _seconds(attempt: Attempt, latest: datetime) -> float:
    end = latest if attempt.ended_at is None else datetime.fromisoformat(attempt.ended_at)
    return max(0.0, (end - datetime.fromisoformat(attempt.started_at)).total_seconds())


def goodput(kept_seconds: float, spent: float) -> float | None:
    """Return the share, 0 to 1, of `spent` seconds, None before the first second."""
    # The clocks of two machines may differ, so that the quotient would exceed 1.
    return None if spent < 1 else round(min(1.0, kept_seconds / spent), 4)


# Weight of the newest step in the running mean: about the last ten steps count.
_NEWEST = 0.2


@dataclass(frozen=True)
class Pace:
    """Running means over the latest steps, without start-up, evaluations and saving."""

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    """Tokens of the data, without padding."""
    seconds_per_evaluation: float = 0.0

    def after_step(self, seconds: float, tokens: int) -> "Pace":
        """The pace after another step of `tokens` tokens."""
        speed = _running_mean(self.tokens_per_second, tokens / seconds if seconds > 0 else 0.0)
        return replace(self, seconds_per_step=_running_mean(self.seconds_per_step, seconds), tokens_per_second=speed)

    def after_evaluation(self, seconds: float) -> "Pace":
        """The pace after an evaluation."""
        return replace(self, seconds_per_evaluation=seconds)

    def remaining_seconds(self, steps: int, evaluations: int) -> float | None:
        """Seconds for these steps and evaluations, or None before the first step."""
        if self.seconds_per_step is None:
            return None
        return steps * self.seconds_per_step + evaluations * self.seconds_per_evaluation


def _running_mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _NEWEST * (value - mean)


_LISTED = 50


def run_usage(attempts: Sequence[Attempt], gpus: int, now: datetime) -> RunUsage:
    """Return the time of all attempts, `gpus` processes each, the last to its end."""
    listed = [
        _usage(attempt, latest, is_last=number == len(attempts))
        for number, (attempt, latest) in enumerate(zip(attempts, _latest_ends(attempts, now), strict=True), 1)
    ]
    return RunUsage(
        gpus=gpus,
        count=len(listed),
        seconds=round(sum(each.seconds for each in listed), 1),
        startup_seconds=round(sum(each.startup_seconds or 0.0 for each in listed), 1),
        lost_seconds=round(sum(each.lost_seconds for each in listed), 1),
        attempts=tuple(listed[-_LISTED:]),
    )


def _usage(attempt: Attempt, latest: datetime, *, is_last: bool) -> AttemptUsage:
    start, seconds = datetime.fromisoformat(attempt.started_at), _seconds(attempt, latest)

    def after(moment: str | None) -> float | None:
        if moment is None:
            return None
        return min(seconds, max(0.0, (datetime.fromisoformat(moment) - start).total_seconds()))

    startup, saved = after(attempt.trained_at), after(attempt.saved_at)
    kept = seconds if is_last else max(filter(None, (startup, saved)), default=0.0)
    return AttemptUsage(
        started_at=attempt.started_at,
        from_step=attempt.from_step,
        seconds=round(seconds, 1),
        startup_seconds=None if startup is None else round(startup, 1),
        lost_seconds=round(seconds - kept, 1),
        ended="succeeded" if is_last else attempt.ended,
    )
