"""How fast a run goes, and how long it still takes at that pace."""

from dataclasses import dataclass

# Weight of the newest step in the running mean: about the last ten steps count.
_NEWEST = 0.2


@dataclass(frozen=True)
class Pace:
    """Running means over the latest steps, without start-up, evaluations and saving."""

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    """Tokens of the data; padding does not count."""
    seconds_per_evaluation: float = 0.0

    def after_step(self, seconds: float, tokens: int) -> "Pace":
        """The pace after another step of `tokens` tokens."""
        return Pace(
            _running_mean(self.seconds_per_step, seconds),
            _running_mean(self.tokens_per_second, tokens / seconds if seconds > 0 else 0.0),
            self.seconds_per_evaluation,
        )

    def after_evaluation(self, seconds: float) -> "Pace":
        """The pace after an evaluation."""
        return Pace(self.seconds_per_step, self.tokens_per_second, seconds)

    def remaining_seconds(self, steps: int, evaluations: int) -> float | None:
        """Seconds for so many more steps and evaluations; None before the first step is done."""
        if self.seconds_per_step is None:
            return None
        return steps * self.seconds_per_step + evaluations * self.seconds_per_evaluation


def _running_mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _NEWEST * (value - mean)
