"""Turns the result into its Markdown table. Pure."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.operator.table import head, row

GIB = 2**30
_NONE = "–"
_MAX_REASON = 160


def tokens_per_second(steps: list[dict[str, float]], last: int) -> float:
    """Return the median over the last steps."""
    return median(step["tokens"] / step["seconds"] for step in steps[-last:])


def idle_share(measured: Mapping[str, Any], last: int) -> float | None:
    """Return the part of a step without work on the GPU; None if no GPU was profiled.

    The profiler slows the host down, so the work of the profiled step is compared with the median time of the others.
    """
    if "busySeconds" not in measured:
        return None
    whole = median(step["seconds"] for step in measured["steps"][-last:])
    return max(0.0, 1 - measured["busySeconds"] / whole)


def table(result: Mapping[str, Any]) -> str:
    """Return the table of a result, below its card, driver and versions."""
    card, workload = result["card"], result["workload"]
    machine = f"{card['name']}, driver {card['driver']}" if card else f"CPU: {result['machine']['processor']}"
    packed = f"packed to {workload['max_length']} tokens, {result['sequencesPerStep']} sequences a step"
    lines = [
        f"{machine}; {result['base']}, random weights; {packed}; {result['date']}.",
        "",
        *head(
            "System",
            "Micro batch",
            "Activations",
            "Tokens/s",
            "Peak allocated, GiB",
            "Peak reserved, GiB",
            "Estimate, GiB",
            "Kernels a step",
            "GPU idle",
        ),
    ]
    lines += [_line(run, workload["last"]) for run in result["runs"]]
    versions = {run["case"]["system"]: run["libraries"] for run in result["runs"] if "libraries" in run}
    lines.append("")
    for system, libraries in versions.items():
        found = (f"{library} {version}" for library, version in libraries.items() if version is not None)
        lines.append(f"- {system}: {', '.join(found)}")
    return "\n".join(lines) + "\n"


def _line(run: Mapping[str, Any], last: int) -> str:
    case = run["case"]
    cells = [case["system"], str(case["micro_batch"]), "recomputed" if case["recompute"] else "kept"]
    if "error" in run:
        reason = run["error"].strip().splitlines()[-1][:_MAX_REASON].replace("|", "\\|")
        return row(*cells, f"failed: {reason}", *[""] * 5)
    idle = idle_share(run, last)
    return row(
        *cells,
        f"{tokens_per_second(run['steps'], last):,.0f}",
        *(_gib(run.get(name)) for name in ("allocatedBytes", "reservedBytes", "estimateBytes")),
        f"{run['kernels']:,}" if "kernels" in run else _NONE,
        _NONE if idle is None else f"{idle:.0%}",
    )


def _gib(size: int | None) -> str:
    return _NONE if size is None else f"{size / GIB:.2f}"
