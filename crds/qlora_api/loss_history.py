"""The losses of a run in its status, which outlives its pods: a table that is thinned as the run grows."""

from collections.abc import Sequence

MAX_POINTS = 200
MAX_HISTORY_LENGTH = 10_000
_COLUMNS = "step,train_loss,valid_loss"
"""As in the file metrics.csv next to an adapter."""


def with_losses(table: str | None, step: int, loss: float | None, eval_loss: float | None) -> str | None:
    """Return the CSV table with the losses after this step, and without those that a resumed run repeats.

    Every report repeats the latest evaluation: one is new if no earlier line has its loss.
    """
    lines = (table or _COLUMNS).splitlines()[1:]
    earlier, same = [line for line in lines if _step(line) < step], [line for line in lines if _step(line) == step]
    known = {_evaluation(line) for line in earlier}
    found = _text(eval_loss) if _text(eval_loss) not in known else ""
    found = found or next(map(_evaluation, same), "")
    if loss is None and not found:
        return table
    return "\n".join((_COLUMNS, *_thinned([*earlier, f"{step},{_text(loss)},{found}"])))


def _thinned(lines: Sequence[str]) -> Sequence[str]:
    """Drop the lines with the closest neighbors, evaluations last, and never the first and the last line."""
    while len(lines) > MAX_POINTS:
        inner = range(1, len(lines) - 1)
        plain = [number for number in inner if not _evaluation(lines[number])]
        closest = min(plain or inner, key=lambda number: _step(lines[number + 1]) - _step(lines[number - 1]))
        lines = [*lines[:closest], *lines[closest + 1 :]]
    return lines


def _text(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.6g}"


def _step(line: str) -> int:
    return int(line.partition(",")[0])


def _evaluation(line: str) -> str:
    return line.rpartition(",")[2]
