"""What the runs show: scores with confidence intervals, and an arm's score as a share of another one's."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import TypeVar

import numpy
from numpy.typing import NDArray

from benchmarks.quality.plan import ARMS, EPOCHS, FULL, LONGER_ARMS, LONGER_EPOCHS
from benchmarks.quality.results import Purpose, Run, of_purpose
from benchmarks.quality.tasks import TASKS

Group = TypeVar("Group", bound=Hashable)
CLAIMED = 0.99
"""The share of full fine-tuning's score that QLoRA is claimed to reach."""
RESAMPLES = 4000
# The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Rights = NDArray[numpy.float64]
"""[seeds, rows]: 1 where the answer of a run is right, else 0."""
Resampled = NDArray[numpy.float64]
"""[resamples]"""


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
    """By task and arm, what was right: of the seeds that all arms have. A task without two such seeds is left out."""
    return _compared({arm: [run for run in of_purpose(runs, "main") if run.cell.arm == arm] for arm in ARMS})


def compared_by_epochs(runs: Sequence[Run]) -> dict[int, dict[str, dict[str, Rights]]]:
    """By number of epochs, task and arm, what was right: of the tasks and seeds that have all of them; else empty."""
    both = {
        (purpose, arm): [run for run in of_purpose(runs, purpose) if run.cell.arm == arm]
        for purpose in ("main", "longer")
        for arm in LONGER_ARMS
    }
    by_task = _compared(both)
    of_purposes: Mapping[int, Purpose] = {EPOCHS: "main", LONGER_EPOCHS: "longer"}
    return {
        epochs: {task: {arm: rights[purpose, arm] for arm in LONGER_ARMS} for task, rights in by_task.items()}
        for epochs, purpose in of_purposes.items()
        if by_task
    }


def _compared(groups: Mapping[Group, Sequence[Run]]) -> dict[str, dict[Group, Rights]]:
    """By task and group, what was right: of the seeds that each group has. A task without two such is left out."""
    found: dict[str, dict[Group, Rights]] = {}
    for task in TASKS:
        by_seed = {
            group: {run.cell.seed: run.right for run in runs if run.cell.task == task} for group, runs in groups.items()
        }
        seeds = sorted(set.intersection(*(set(of_group) for of_group in by_seed.values())))
        if len(seeds) > 1:
            found[task] = {
                group: numpy.array([[float(one) for one in of_group[seed]] for seed in seeds])
                for group, of_group in by_seed.items()
            }
    return found


def ratios(by_task: Mapping[str, Mapping[str, Rights]], reference: str = FULL) -> dict[str, Interval]:
    """Each arm's mean score over the tasks, as a share of that of the reference; with bootstrap intervals.

    Seeds and held-out rows are drawn anew in each task, the same for all arms, which were trained on the same rows by
    seed and answer the same prompts; tasks are fixed. Percentile intervals (Efron and Tibshirani 1993, chapter 13).
    """
    drawn, means = _drawn(by_task, reference), _means(by_task)
    return {arm: _interval(means[arm] / means[reference], drawn[arm] / drawn[reference]) for arm in means}


def change(before: Mapping[str, Mapping[str, Rights]], after: Mapping[str, Mapping[str, Rights]], arm: str) -> Interval:
    """By how much the arm's share of full fine-tuning's score has changed, with a bootstrap interval as above.

    `before` and `after` are of the same tasks, seeds and prompts, which are drawn the same for both.
    """
    shares, drawn = [], []
    for by_task in (before, after):
        means, resampled = _means(by_task), _drawn(by_task, FULL)
        shares.append(means[arm] / means[FULL])
        drawn.append(resampled[arm] / resampled[FULL])
    return _interval(shares[1] - shares[0], drawn[1] - drawn[0])


def _drawn(by_task: Mapping[str, Mapping[str, Rights]], reference: str) -> dict[str, Resampled]:
    """The summed scores of each arm in each resample; the same ones are drawn for data of the same shape."""
    generator = numpy.random.Generator(numpy.random.Philox(key=0))
    arms = list(next(iter(by_task.values())))
    drawn = {arm: numpy.zeros(RESAMPLES) for arm in arms}
    for rights in by_task.values():
        seeds, rows = rights[reference].shape
        for resample in range(RESAMPLES):
            # The mean over drawn seeds and rows, by how often each was drawn.
            of_seeds = numpy.bincount(generator.integers(seeds, size=seeds), minlength=seeds) / seeds
            of_rows = numpy.bincount(generator.integers(rows, size=rows), minlength=rows) / rows
            for arm in arms:
                drawn[arm][resample] += of_seeds @ rights[arm] @ of_rows
    return drawn


def _means(by_task: Mapping[str, Mapping[str, Rights]]) -> dict[str, float]:
    """The summed scores of each arm over the tasks."""
    arms = list(next(iter(by_task.values())))
    return {arm: sum(float(rights[arm].mean()) for rights in by_task.values()) for arm in arms}


def _interval(value: float, resampled: Resampled) -> Interval:
    low, high = numpy.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def verdict(share: Interval) -> str:
    """What the interval of a share says of the claim."""
    if share.low is not None and share.low >= CLAIMED:
        return "met"
    if share.high is not None and share.high < CLAIMED:
        return "**missed**"
    side = "at or above" if share.value >= CLAIMED else "below"
    return f"not decided (mean {side} {100 * CLAIMED:.0f} %)"
