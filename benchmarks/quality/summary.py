"""Makes the tables and the figure of the documentation from the runs."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.operator.table import head, row
from benchmarks.quality.analysis import Interval, compared, drawn_means, share, verdict
from benchmarks.quality.plan import (
    ADAPTERS,
    ARMS,
    FULL,
    LEAST_SEEDS,
    LEVELS,
    LORA,
    OTHER_STEPS,
    QLORA,
    SEEDS,
    STEPS,
    WHOLE,
    chosen_rate,
    convergence,
    planned_runs,
    power,
)
from benchmarks.quality.results import Run
from benchmarks.quality.tasks import TASKS
from benchmarks.tuning import Arm

NAME, COMMAND = "quality", "benchmarks.quality"
"""Name of the block in the documentation, and its command."""
NOTHING = "Not run yet.\n"
PICTURE = "![Share of full fine-tuning's score against optimizer steps, for LoRA and QLoRA](../images/quality.svg)"
_LENGTHS = tuple(sorted((STEPS, *OTHER_STEPS)))
_PAIRS: Mapping[str, tuple[Arm, Arm]] = {
    "LoRA, of full fine-tuning": (LORA, FULL),
    "QLoRA, of full fine-tuning": (QLORA, FULL),
    "QLoRA, of LoRA": (QLORA, LORA),
}


def tables(runs: Sequence[Run]) -> str:
    """Return the figure and the tables in Markdown, or a sentence without a result."""
    if not runs:
        return NOTHING
    parts = (
        [PICTURE] if shares(runs, STEPS) else [],
        _claims(runs),
        _by_steps(runs),
        _scores(runs),
        _power(runs),
        _tuning(runs),
        _notes(runs),
    )
    return "\n".join("\n".join(part) + "\n" for part in parts if part)


def claim_table(runs: Sequence[Run]) -> str:
    """Return the shares of full fine-tuning's score, or a sentence without one."""
    return "\n".join(_claims(runs) or [NOTHING.strip()]) + "\n"


def shares(runs: Sequence[Run], steps: int) -> dict[str, Interval]:
    """The shares after so many steps, by name; none before a task has two seeds of all arms."""
    by_task = compared(runs, steps)
    if not by_task:
        return {}
    means = drawn_means(by_task)
    return {name: share(means, arm, reference) for name, (arm, reference) in _PAIRS.items()}


def _claims(runs: Sequence[Run]) -> list[str]:
    found = shares(runs, STEPS)
    if not found:
        return []
    levels = (f"≥ {100 * level:.0f} %" for level in LEVELS)
    lines = head(f"Share of the score after {STEPS} steps ({_counts(runs, STEPS)})", "90 % interval", *levels)
    for name, each in found.items():
        lines.append(row(name, _percent(each), *(verdict(each, level) for level in LEVELS)))
    return lines


def _by_steps(runs: Sequence[Run]) -> list[str]:
    by_steps = _shares_by_steps(runs)
    if not by_steps:
        return []
    lines = head("Share of the score, by steps", *(f"{steps} ({_counts(runs, steps)})" for steps in by_steps))
    return [*lines, *(row(name, *(_percent(found[name]) for found in by_steps.values())) for name in _PAIRS)]


def _shares_by_steps(runs: Sequence[Run]) -> dict[int, dict[str, Interval]]:
    return {steps: found for steps in _LENGTHS if (found := shares(runs, steps))}


def _counts(runs: Sequence[Run], steps: int) -> str:
    by_task = compared(runs, steps)
    seeds = sorted({len(rights[FULL]) for rights in by_task.values()})
    return f"{len(by_task)} of {len(TASKS)} tasks, {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds"


def _scores(runs: Sequence[Run]) -> list[str]:
    lines = head("Right answers, %", *TASKS)
    for steps in _LENGTHS:
        by_task = compared(runs, steps)
        for arm, label in ARMS.items() if by_task else ():
            found = (_score(by_task[task][arm].mean(axis=1).tolist()) if task in by_task else "–" for task in TASKS)
            lines.append(row(f"{label}, {steps} steps", *found))
    return lines if len(lines) > 2 else []


def _score(scores: Sequence[float]) -> str:
    found = Interval.of_seeds(scores)
    return f"{100 * found.value:.1f} ± {100 * (found.high - found.value):.1f}"


def _power(runs: Sequence[Run]) -> list[str]:
    found = power(runs)
    if found is None:
        return []
    needed = " and ".join(f"{found.pairs(level)} pairs for {100 * level:.0f} %" for level in LEVELS)
    text = (
        f"In the first pairs of runs with {STEPS} steps, QLoRA's score minus full fine-tuning's has a "
        f"standard deviation of {100 * found.deviation:.2f} points. At this deviation the test needs {needed}; "
        f"{found.tasks} tasks with {found.seeds} seeds give {found.tasks * found.seeds}."
    )
    return [text]


def _tuning(runs: Sequence[Run]) -> list[str]:
    lines = head(
        "Tuning",
        "Rate of full",
        "Right on validation",
        "Change of loss and score",
        "Takes part",
        "Rate of adapters",
    )
    for task in TASKS:
        found, rates = convergence(runs, task), [chosen_rate(runs, task, tuned) for tuned in (WHOLE, ADAPTERS)]
        whole, shared = ("–" if rate is None else f"{rate:g}" for rate in rates)
        if found is not None:
            change = f"{100 * found.change:.1f} %, {100 * found.points:.1f} points"
            takes_part = "yes" if found.is_in else "**no**"
            lines.append(row(f"`{task}`", whole, f"{100 * found.right:.1f} %", change, takes_part, shared))
    return lines if len(lines) > 2 else []


def _notes(runs: Sequence[Run]) -> list[str]:
    """Return how often generation agrees, and what the runs took."""
    pairs = [pair for run in runs for pair in zip(run.generated, run.right, strict=False)]
    equal = sum(one == other for one, other in pairs)
    agreement = [f"Generation agrees with teacher forcing on {equal:,} of {len(pairs):,} prompts."] if pairs else []
    hours = sum(run.processor_seconds for run in runs) / 3600
    commits = dict.fromkeys((run.commit or "unknown")[:7] for run in runs)
    processors = dict.fromkeys(run.processor for run in runs)
    found = power(runs)
    counts = (LEAST_SEEDS, len(SEEDS)) if found is None else (found.seeds,)
    planned = " to ".join(str(planned_runs(seeds)) for seeds in counts)
    spent = (
        f"{len(runs)} runs, of {planned} if each task takes part and no grid is extended; {hours:.1f} hours of "
        f"processor time; code at {', '.join(commits)}; processors: {'; '.join(processors)}."
    )
    return [" ".join([*agreement, spent])]


def _percent(found: Interval) -> str:
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def curves_figure(runs: Sequence[Run]) -> bytes | None:
    """Return a reproducible SVG of the shares against the steps, or None before there is one at the main length."""
    by_steps = _shares_by_steps(runs)
    if STEPS not in by_steps:
        return None
    style = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "quality"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for level, line in zip((1.0, *LEVELS), ("-", "--", ":"), strict=True):
            axes.axhline(100 * level, color="#6b7280", linewidth=0.8, linestyle=line)
        for place, (name, color) in enumerate(zip(list(_PAIRS)[:2], ("#0f766e", "#2563eb"), strict=True)):
            of_arm = [each[name] for each in by_steps.values()]
            axes.errorbar(
                [steps * (1.0 + 0.02 * place) for steps in by_steps],
                [100 * each.value for each in of_arm],
                yerr=list(zip(*(_bars(each) for each in of_arm), strict=True)),
                marker="o",
                capsize=3,
                color=color,
                label=name.partition(",")[0],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(_LENGTHS, list(map(str, _LENGTHS)))
        axes.set_xlabel("Optimizer steps")
        axes.set_ylabel("Share of full fine-tuning's score, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
        image = BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return image.getvalue()


def _bars(found: Interval) -> tuple[float, float]:
    return 100 * (found.value - found.low), 100 * (found.high - found.value)


def write_figure(runs: Sequence[Run], path: Path) -> None:
    """Write the figure, unless there is no share at the main length yet."""
    if (image := curves_figure(runs)) is not None:
        path.write_bytes(image)
