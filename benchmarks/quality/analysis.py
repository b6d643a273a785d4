"""Analyzes the runs: scores with confidence intervals, and an arm's score as a share of another one's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

import numpy
from numpy.typing import NDArray

from benchmarks.quality.plan import ARMS, FULL
from benchmarks.quality.results import Run

CLAIMED = 0.99
"""The claimed share of QLoRA in full fine-tuning's score."""
RESAMPLES = 4000
# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Rights = NDArray[numpy.float64]
"""[seeds, rows]: 1 where the answer of a run is right, else 0."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval; without one if there is a single run."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of_seeds(cls, scores: Sequence[float]) -> "Interval":
        """The mean, with Student's t over the seeds: how runs differ, on the same held-out rows."""
        value = mean(scores)
        if len(scores) < 2:
            return cls(value, None, None)
        half = _T[len(scores) - 2] * stdev(scores) / sqrt(len(scores))
        return cls(value, value - half, value + half)


def scores(runs: Sequence[Run], **cell: object) -> list[float]:
    """The scores of the runs whose cells have these values, by seed."""
    found = [run for run in runs if all(getattr(run.cell, name) == value for name, value in cell.items())]
    return [run.score for run in sorted(found, key=lambda run: run.cell.seed)]


def compared(runs: Sequence[Run]) -> dict[str, dict[str, Rights]]:
    """The right answers by task and arm, of the seeds that all arms have. A task without two such seeds is left out."""
    main = [run for run in runs if run.cell.purpose == "main" and run.cell.arm in ARMS]
    found: dict[str, dict[str, Rights]] = {}
    for task in dict.fromkeys(run.cell.task for run in main):
        of_arm = {arm: {r.cell.seed: r for r in main if (r.cell.task, r.cell.arm) == (task, arm)} for arm in ARMS}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in of_arm.values())))
        if len(seeds) > 1:
            found[task] = {
                arm: numpy.array([[float(one) for one in by_seed[seed].right] for seed in seeds])
                for arm, by_seed in of_arm.items()
            }
    return found


def ratios(by_task: Mapping[str, Mapping[str, Rights]], reference: str = FULL) -> dict[str, Interval]:
    """Each arm's mean score over the tasks, as a share of that of the reference; with bootstrap intervals.

    Seeds and held-out rows are drawn again in each task, the same for all arms, which were trained on the same rows by
    seed and answer the same prompts; tasks are fixed. Percentile intervals (Efron and Tibshirani 1993, chapter 13).
    """
    generator = numpy.random.Generator(numpy.random.Philox(key=0))
    drawn = {arm: numpy.zeros(RESAMPLES) for arm in ARMS}
    for rights in by_task.values():
        seeds, rows = rights[reference].shape
        for resample in range(RESAMPLES):
            # The mean over drawn seeds and rows, by how often each was drawn.
            of_seeds = numpy.bincount(generator.integers(seeds, size=seeds), minlength=seeds) / seeds
            of_rows = numpy.bincount(generator.integers(rows, size=rows), minlength=rows) / rows
            for arm in ARMS:
                drawn[arm][resample] += of_seeds @ rights[arm] @ of_rows
    means = {arm: sum(float(rights[arm].mean()) for rights in by_task.values()) for arm in ARMS}
    found = {}
    for arm in ARMS:
        shares = drawn[arm] / drawn[reference]
        low, high = numpy.quantile(shares, [0.025, 0.975])
        found[arm] = Interval(means[arm] / means[reference], float(low), float(high))
    return found


def verdict(share: Interval) -> str:
    """The verdict on the claim by the interval of a share."""
    if share.low is not None and share.low >= CLAIMED:
        return "met"
    if share.high is not None and share.high < CLAIMED:
        return "**missed**"
    side = "at or above" if share.value >= CLAIMED else "below"
    return f"not decided (mean {side} {100 * CLAIMED:.0f} %)"
