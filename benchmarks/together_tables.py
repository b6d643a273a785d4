"""Makes the tables of the documentation of what was measured of several adapters trained together."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.operator.table import head, row

MIB = 2**20
NAME, COMMAND = "together", "benchmarks.together"
"""Of the result, and what measures it."""
TARGET_SPEEDUP, TARGET_MEMORY = 1.5, 0.05


def tables(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    lines = head(
        "Tokens of each adapter in a step",
        "Adapters",
        "Together, tokens/s",
        "One by one, tokens/s",
        "",
        f"≥ {TARGET_SPEEDUP} ×",
    )
    for each in result["turns"]:
        tokens = each["adapters"] * each["tokens"]
        together, one_by_one = (tokens / median(each[way]) for way in ("together", "one_by_one"))
        factor = speedup(each)
        lines.append(
            row(
                str(each["tokens"]),
                str(each["adapters"]),
                f"{together:.0f}",
                f"{one_by_one:.0f}",
                f"{factor:.2f} ×",
                _met(factor >= TARGET_SPEEDUP),
            )
        )
    tokens = result["memory"][0]["tokens"]
    lines += [
        "",
        *head(
            f"Adapters, {tokens} tokens of each in a step",
            "Base, MiB",
            "Peak, MiB",
            "Base + adapters × one alone, MiB",
            f"≤ {100 * TARGET_MEMORY:.0f} % above",
        ),
    ]
    alone = result["memory"][0]
    for each in result["memory"]:
        limit = each["base_bytes"] + each["adapters"] * (alone["peak_bytes"] - alone["base_bytes"])
        lines.append(
            row(
                str(each["adapters"]),
                *(f"{bytes_ / MIB:,.0f}" for bytes_ in (each["base_bytes"], each["peak_bytes"], limit)),
                _met(each["peak_bytes"] <= (1 + TARGET_MEMORY) * limit),
            )
        )
    return "\n".join(lines) + "\n"


def speedup(turns: Mapping[str, Any]) -> float:
    """How many times as many tokens per second are trained on together: median over the turns, each with both ways."""
    return median(alone / both for both, alone in zip(turns["together"], turns["one_by_one"], strict=True))


def _met(met: bool) -> str:
    return "met" if met else "missed"
