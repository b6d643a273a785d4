"""Decides from right answers whether an adapter keeps the score of full fine-tuning: pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

import numpy
from numpy.typing import NDArray

from benchmarks.quality.plan import ARMS, FEWER_SEEDS, FULL, LEAST_SEEDS, STEPS
from benchmarks.quality.results import Run
from benchmarks.tuning import Arm

RESAMPLES = 2000
# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
Rights = NDArray[numpy.float64]
"""[seeds, prompts]: 1 where the answer of a run is right, else 0."""
Compared = Mapping[str, Mapping[Arm, Rights]]
"""Right answers by task and arm; the seeds of a task are those of all arms."""


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of a confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of_seeds(cls, scores: Sequence[float]) -> "Interval":
        """Return the mean, with Student's 95 % interval over the seeds on the same held-out prompts."""
        value, half = mean(scores), _T[len(scores) - 2] * stdev(scores) / sqrt(len(scores))
        return cls(value, value - half, value + half)


def compared(runs: Sequence[Run], steps: int) -> Compared:
    """Return the right answers after so many steps, of tasks with enough seeds of all arms for a bootstrap."""
    enough = LEAST_SEEDS if steps == STEPS else len(FEWER_SEEDS)
    main = [run for run in runs if (run.cell.purpose, run.cell.steps) == ("main", steps)]
    found = {}
    for task in dict.fromkeys(run.cell.task for run in main):
        by_seed: dict[Arm, dict[int, str]] = {
            arm: {r.cell.seed: r.right for r in main if (r.cell.task, r.cell.arm) == (task, arm)} for arm in ARMS
        }
        seeds = sorted(set.intersection(*map(set, by_seed.values())))
        if len(seeds) >= enough:
            found[task] = {
                arm: numpy.array([[float(one) for one in right[seed]] for seed in seeds])
                for arm, right in by_seed.items()
            }
    return found


def drawn_means(by_task: Compared, resamples: int = RESAMPLES) -> dict[Arm, NDArray[numpy.float64]]:
    """Return each arm's mean score over the tasks, and behind it those of bootstrap samples.

    A sample draws the seeds, and the prompts, of each task again: the same for all arms, which train on the same rows
    by seed and answer the same prompts. Tasks are fixed (Efron and Tibshirani 1993, chapter 13).
    """
    generator = numpy.random.Generator(numpy.random.Philox(key=0))
    found: dict[Arm, NDArray[numpy.float64]] = {arm: numpy.zeros(resamples + 1) for arm in ARMS}
    for rights in by_task.values():
        of_seeds, of_prompts = (_weights(generator, count, resamples) for count in rights[FULL].shape)
        for arm in ARMS:
            found[arm] += ((of_seeds @ rights[arm]) * of_prompts).sum(axis=1) / len(by_task)
    return found


def _weights(generator: numpy.random.Generator, count: int, resamples: int) -> NDArray[numpy.float64]:
    """Return [1 + resamples, count]: the share of each of `count` things, equal in the first row, then as drawn."""
    drawn = generator.integers(count, size=(resamples, count)) + numpy.arange(resamples)[:, None] * count
    counts = numpy.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count)
    return numpy.vstack((numpy.ones(count), counts)).astype(numpy.float64) / count


def share(means: Mapping[Arm, NDArray[numpy.float64]], arm: Arm, reference: Arm) -> Interval:
    """Return an arm's share of the reference's score; each bound errs with 5 %."""
    shares = means[arm] / means[reference]
    low, high = numpy.quantile(shares[1:], [0.05, 0.95])
    return Interval(float(shares[0]), float(low), float(high))


def verdict(found: Interval, level: float) -> str:
    """The verdict on a share of at least `level`."""
    if found.low >= level:
        return "met"
    return "**missed**" if found.high < level else "not decided"
