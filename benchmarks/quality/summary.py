"""Makes the tables and the figure of the documentation from the runs: scores with confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import matplotlib as mpl
import numpy
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.operator.table import head, row
from benchmarks.quality.plan import ARMS, BASE, CELLS, FULL, LORA, OTHER_RANKS, QLORA, RANK, chosen_rate
from benchmarks.quality.results import Run, of_purpose
from benchmarks.quality.tasks import TASKS

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
        """Return the mean, with Student's t over the seeds on the same held-out rows."""
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
    """Return right answers by task and arm, of the seeds (at least two) of all arms."""
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


NAME, COMMAND = "quality", "benchmarks.quality"
"""Name of the block in the documentation, and its command."""
PICTURE = "![Right answers on held-out rows, for each task and arm, with 95 % intervals](../images/quality.svg)"
NOTHING = "No task has two runs of each arm yet.\n"


def tables(runs: Sequence[Run]) -> str:
    """Return the figure and main tables in Markdown, or sentences without a result."""
    by_task = compared(runs)
    if not by_task:
        return f"{NOTHING}\n{_spent(runs)}\n" if runs else NOTHING
    parts = [
        [PICTURE],
        _scores(runs, list(by_task)),
        _claim(by_task),
        _against_lora(by_task),
    ]
    return "\n".join([*("\n".join(part) + "\n" for part in parts), _spent(runs)]) + "\n"


def further_tables(runs: Sequence[Run]) -> str:
    """Return the rates, and scores by rank and by rows, or a sentence without results."""
    by_task = compared(runs)
    if not by_task:
        return NOTHING
    parts = [part for part in (_rates(runs, list(by_task)), _ranks(runs), _rows(runs)) if part]
    return "\n".join("\n".join(part) + "\n" for part in parts)


def claim_table(runs: Sequence[Run]) -> str:
    """Return each arm's share of full fine-tuning's score, or a sentence without one."""
    by_task = compared(runs)
    return "\n".join(_claim(by_task)) + "\n" if by_task else NOTHING


def _claim(by_task: Mapping[str, Mapping[str, Rights]]) -> list[str]:
    seeds = {len(rights[FULL]) for rights in by_task.values()}
    counts = f"{len(by_task)} tasks, {_range(seeds)} seeds"
    lines = head(f"Share of full fine-tuning's score ({counts})", f"Claimed: ≥ {CLAIMED:.0%}", "")
    for arm, share in ratios(by_task).items():
        if arm != FULL:
            lines.append(row(ARMS[arm], _percent(share, over=True), verdict(share)))
    return lines


def _against_lora(by_task: Mapping[str, Mapping[str, Rights]]) -> list[str]:
    """Return the cost of the 4-bit base alone. The study makes no claim about it."""
    lines = head("Share of the score of LoRA on the base in 16 bit", "")
    shares = ratios(by_task, LORA)
    return [*lines, *(row(ARMS[arm], _percent(shares[arm], over=True)) for arm in ARMS if arm not in (FULL, LORA))]


def _scores(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    lines = head("Right answers, %", *tasks, "mean")
    untuned = [scores(runs, purpose="main", task=task, arm=BASE) for task in tasks]
    if all(untuned):
        cells = [Interval.of_seeds(found) for found in untuned]
        lines.append(row("The base, not tuned", *map(_percent, cells), f"{100 * mean(c.value for c in cells):.1f}"))
    by_task = compared(runs)
    for arm, label in ARMS.items():
        found = [Interval.of_seeds([float(seed.mean()) for seed in by_task[task][arm]]) for task in tasks]
        lines.append(row(label, *map(_percent, found), f"{100 * mean(each.value for each in found):.1f}"))
    return lines


def _rates(runs: Sequence[Run], tasks: Sequence[str]) -> list[str]:
    lines = head("Learning rate chosen on the validation set", *tasks)
    for arm, label in ARMS.items():
        chosen = [chosen_rate(runs, task, arm) for task in tasks]
        lines.append(row(label, *("" if rate is None else f"{rate:g}" for rate in chosen)))
    return lines


def _ranks(runs: Sequence[Run]) -> list[str]:
    varied = of_purpose(runs, "rank", "targets")
    tasks = [task for task in TASKS if any(run.cell.task == task for run in varied)]
    if not tasks:
        return []
    lines = head("QLoRA (NF4, double quantization), right answers, %", *tasks)
    settings = [(f"rank {rank}", {"rank": rank, "targets": "all-linear"}) for rank in sorted((*OTHER_RANKS, RANK))]
    settings.append((f"rank {RANK}, attention only", {"rank": RANK, "targets": "attention"}))
    seeds = {run.cell.seed for run in varied}
    for label, values in settings:
        cells = []
        for task in tasks:
            usual = [run for run in runs if run.cell.purpose == "main" and run.cell.seed in seeds]
            cells.append(_cell_of(scores([*varied, *usual], task=task, arm=QLORA, **values)))
        lines.append(row(label, *cells))
    return lines


def _rows(runs: Sequence[Run]) -> list[str]:
    varied = of_purpose(runs, "rows")
    tasks = [task for task in TASKS if any(run.cell.task == task for run in varied)]
    if not tasks:
        return []
    lines = head("Right answers, %, by rows to train on", *tasks)
    seeds = {run.cell.seed for run in varied}
    usual = [run for run in runs if run.cell.purpose == "main" and run.cell.seed in seeds]
    for divisor, label in ((4, "a quarter"), (2, "half"), (1, "all")):
        for arm in (FULL, QLORA):
            counts = {task: TASKS[task].train_rows // divisor for task in tasks}
            source = varied if divisor > 1 else usual
            cells = [_cell_of(scores(source, task=task, arm=arm, rows=counts[task])) for task in tasks]
            lines.append(row(f"{label}, {ARMS[arm]}", *cells))
    return lines


def _spent(runs: Sequence[Run]) -> str:
    hours = sum(run.processor_seconds for run in runs) / 3600
    commits = dict.fromkeys((run.commit or "unknown")[:7] for run in runs)
    processors = dict.fromkeys(run.processor for run in runs)
    return (
        f"{len(runs)} of {CELLS} runs, {hours:.1f} hours of processor time; code at {', '.join(commits)}; "
        f"processors: {'; '.join(processors)}."
    )


def _cell_of(found: Sequence[float]) -> str:
    return _percent(Interval.of_seeds(found)) if found else ""


def _percent(value: Interval, *, over: bool = False) -> str:
    """In percent with the interval: as ± for a mean, as bounds for a share."""
    if value.low is None or value.high is None:
        return f"{100 * value.value:.1f}"
    if over:
        return f"{100 * value.value:.1f} % ({100 * value.low:.1f} to {100 * value.high:.1f})"
    return f"{100 * value.value:.1f} ± {100 * (value.high - value.value):.1f}"


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


_COLORS = ("#6b7280", "#0f766e", "#2563eb", "#93c5fd", "#d9480f")


def scores_figure(runs: Sequence[Run]) -> bytes:
    """Return a reproducible SVG: for each task and arm a bar, with 95 % interval."""
    by_task = compared(runs)
    style = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "quality"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for place, (arm, label) in enumerate(ARMS.items()):
            found = [Interval.of_seeds([float(seed.mean()) for seed in rights[arm]]) for rights in by_task.values()]
            axes.bar(
                [task + (place - 2) * 0.16 for task in range(len(found))],
                [100 * each.value for each in found],
                width=0.15,
                yerr=[100 * ((each.high or each.value) - each.value) for each in found],
                error_kw={"elinewidth": 0.9, "capsize": 2},
                color=_COLORS[place],
                label=label,
            )
        axes.set_xticks(range(len(by_task)), list(by_task))
        axes.set_ylabel("Right answers on held-out rows, %")
        axes.set_ylim(0, 105)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.22))
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def write_figure(runs: Sequence[Run], path: Path) -> None:
    """Write the figure, unless no task has been compared yet."""
    if compared(runs):
        path.write_bytes(scores_figure(runs))
