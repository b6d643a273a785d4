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
        factor = together / one_by_one
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
            "Peak, MiB",
            "Base + adapters × those of one, MiB",
            "",
            f"Within {100 * TARGET_MEMORY:.0f} %",
        ),
    ]
    for each in result["memory"]:
        difference = expected_peak(result, each["adapters"]) / each["peak_bytes"] - 1
        lines.append(
            row(
                str(each["adapters"]),
                f"{each['peak_bytes'] / MIB:,.0f}",
                f"{expected_peak(result, each['adapters']) / MIB:,.0f}",
                f"{100 * difference:+.1f} %",
                _met(abs(difference) <= TARGET_MEMORY),
            )
        )
    return "\n".join(lines) + "\n"


def expected_peak(result: Mapping[str, Any], adapters: int) -> float:
    """Resident bytes if each further adapter takes what the only one of a process takes above the base."""
    one = next(each for each in result["memory"] if each["adapters"] == 1)
    base: int = one["base_bytes"]
    return base + adapters * (one["peak_bytes"] - base)


def _met(met: bool) -> str:
    return "met" if met else "missed"
