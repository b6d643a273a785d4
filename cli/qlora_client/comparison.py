"""Compares jobs: their different settings, their results, and their losses drawn over each other."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_api.duration import format_duration
from qlora_client.history import LossHistory
from qlora_client.jobs.job import Job

ABSENT = "–"
# They decide how the job runs, not the adapter.
_WITHOUT_EFFECT = frozenset({"suspend", "cancel", "retry.request", "cleanupAfterSeconds", "activeDeadlineSeconds"})


@dataclass(frozen=True)
class Row:
    """One property of all jobs, in their order."""

    label: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """A job, with its losses as far as they could be read."""

    job: Job
    history: LossHistory


def differing_settings(jobs: Sequence[Job]) -> list[Row]:
    """The fields of the spec, and of what was fixed when the jobs started, that are not the same in all jobs.

    A field is named by its path below spec. A list of plain values is one field; of a list of objects, each entry has
    separate fields.
    """
    written = [row for row in _rows([dict(_fields(job.spec, "")) for job in jobs]) if row.label not in _WITHOUT_EFFECT]
    # A job that has not started differs in none of these yet.
    fixed = [row for row in _rows([_fixed(job) for job in jobs]) if len({*row.values} - {ABSENT}) > 1]
    return [row for row in (*written, *fixed) if len(set(row.values)) > 1]


def _rows(flat: Sequence[Mapping[str, str]]) -> list[Row]:
    names = dict.fromkeys(name for fields in flat for name in fields)
    return [Row(name, tuple(fields.get(name, ABSENT) for fields in flat)) for name in names]


def _fields(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _fields(part, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
        for number, part in enumerate(value):
            yield from _fields(part, f"{path}[{number}]")
    elif isinstance(value, list):
        yield path, ", ".join(map(_text, value))
    else:
        yield path, _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fixed(job: Job) -> dict[str, str]:
    """Facts that the spec lacks: the version of the model, the data and the trainer."""
    found = {
        "the model's revision": job.status.get("modelRevision"),
        "the data's SHA-256": (job.status.get("dataset") or {}).get("sha256"),
        "the trainer's image": job.status.get("image"),
    }
    return {name: str(value) for name, value in found.items() if value}


def results(compared: Sequence[Compared], now: datetime) -> list[Row]:
    """Return jobs' results without unused properties, until `now` for running jobs."""
    rows = [Row(label, tuple(read(each) for each in compared)) for label, read in _RESULTS.items()]
    rows.append(Row("Time", tuple(_duration(each.job, now) for each in compared)))
    return [row for row in rows if any(value != ABSENT for value in row.values)]


def _steps(each: Compared) -> str:
    progress = each.job.progress
    return f"{progress.get('step', 0)}/{progress['totalSteps']}" if progress.get("totalSteps") else ABSENT


def _first_held_out(each: Compared) -> str:
    measured = (each.job.status.get("gate") or {}).get("initialEvalLoss")
    return _loss(each.history.held_out.get(0, measured))


def _best_held_out(each: Compared) -> str:
    best = each.history.best
    return ABSENT if best is None else f"{best[1]:.4f} at step {best[0]}"


def _score(each: Compared) -> str:
    score = (each.job.status.get("gate") or {}).get("score")
    return ABSENT if score is None else f"{score:.1%}"


def _speed(each: Compared) -> str:
    speed = each.job.progress.get("tokensPerSecond")
    return f"{speed:,.0f} tokens/s" if speed else ABSENT


def _memory(each: Compared) -> str:
    peak = each.job.progress.get("peakMemoryBytes") or (each.job.status.get("memory") or {}).get("peakBytes")
    return f"{peak / 2**30:.1f} GiB" if peak else ABSENT


def _gpu_hours(each: Compared) -> str:
    return ABSENT if each.job.gpu_hours is None else f"{each.job.gpu_hours:.2f}"


def _loss(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _duration(job: Job, now: datetime) -> str:
    """From the start to the end, or to now, waiting included."""
    started, ended = job.status.get("startTime"), job.status.get("completionTime")
    if not started:
        return ABSENT
    until = datetime.fromisoformat(ended) if ended else now
    return format_duration(max(0.0, (until - datetime.fromisoformat(started)).total_seconds()))


_RESULTS: Mapping[str, Callable[[Compared], str]] = {
    "Phase": lambda each: each.job.phase,
    "Optimizer steps": _steps,
    "Training loss": lambda each: _loss(each.job.progress.get("loss")),
    "Held-out loss before": _first_held_out,
    "Held-out loss": lambda each: _loss(each.job.progress.get("evalLoss")),
    "Best held-out loss": _best_held_out,
    "Answers that passed": _score,
    "Speed": _speed,
    "Peak memory": _memory,
    "GPU hours": _gpu_hours,
    "Cost": lambda each: str((each.job.status.get("usage") or {}).get("cost") or ABSENT),
    "Recoveries": lambda each: str(each.job.recoveries),
}


_SMOOTHED_SHARE = 0.05


def smoothed(points: Mapping[int, float]) -> dict[int, float]:
    """The exponential moving average over about a twentieth of the points, without the bias towards its start.

    Source: the bias correction of Adam, arXiv 1412.6980, section 3.
    """
    weight = 2 / (max(1.0, _SMOOTHED_SHARE * len(points)) + 1)
    mean, total, result = 0.0, 0.0, {}
    for step, value in points.items():
        mean += weight * (value - mean)
        total += weight * (1 - total)
        result[step] = mean / total
    return result


def draw_histories(histories: Mapping[str, LossHistory], axes: Any) -> Any:
    """Draw training losses, as they are and smoothed, and held-out losses with dots, on matplotlib's axes.

    Returns the axes.
    """
    # It takes a second to import, and is not needed for a picture in the terminal.
    from matplotlib.ticker import MaxNLocator

    for number, (name, history) in enumerate(histories.items()):
        color, curve = f"C{number}", smoothed(history.training)
        axes.plot(list(history.training), list(history.training.values()), color=color, alpha=0.2, linewidth=0.8)
        axes.plot(list(curve), list(curve.values()), color=color, label=name)
        axes.plot(list(history.held_out), list(history.held_out.values()), "o--", color=color, markersize=4)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Loss (dots: held-out rows)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes
