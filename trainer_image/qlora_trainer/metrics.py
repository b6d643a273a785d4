"""What a run measures: its history on disk, its speed and time left, and the memory it has used."""

import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_trainer.core.context import Device

# Weight of the newest step in the running mean: about the last ten steps count.
_NEWEST = 0.2
_MEMORY_OF_PROCESS = Path("/proc/self/statm")


@dataclass(frozen=True)
class Pace:
    """How fast the run goes, without start-up, evaluations and saving."""

    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    seconds_per_evaluation: float = 0.0

    def after_step(self, seconds: float, tokens: int) -> "Pace":
        """The pace after another step of `tokens` useful tokens (there is no padding)."""
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


def peak_memory_bytes(device: Device) -> int:
    """The most memory that this process has used: on the GPU, or on a CPU in main memory."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes(device: Device) -> int:
    """The most memory that this process has used since it was last asked: on the GPU, or on a CPU what it uses now.

    So a GPU's peaks within a step are seen, each at its own step.
    """
    if device == "cuda":
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak
    resident_pages = int(_MEMORY_OF_PROCESS.read_text().split()[1])
    return resident_pages * resource.getpagesize()
