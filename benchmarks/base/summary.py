"""Turns the measurements of the 4-bit base into figures, and these into tables of the documentation."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.operator.table import head, row

MIB, MB, GB = 2**20, 10**6, 10**9
NAME, COMMAND = "base", "benchmarks.base"
"""Name of the result, and its command."""
NAMES = {
    "ours": "In pieces, as `prepare` does",
    "bitsandbytes": "bitsandbytes, the whole weight",
    "copy": "A plain copy",
}
WAYS = {
    "before": "The train step quantizes the original",
    "after": "The train step maps the base that `prepare` made",
}


def figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of the repetitions, and memory above that of the libraries alone."""
    return {
        "quantizer": {
            name: {
                "bytesPerSecond": found["bytesPerSecond"],
                "timesTheWeight": found["aboveBytes"] / found["weightBytes"],
            }
            for name, found in measured["quantizer"].items()
        },
        "bases": [
            {
                "name": each["name"],
                "parameters": each["parameters"],
                "originalBytes": each["originalBytes"],
                "baseBytes": each["baseBytes"],
                "seconds": each["seconds"],
                "aboveLibrariesBytes": each["peakAnonymousBytes"] - each["librariesBytes"],
                "peakBytes": each["peakBytes"],
            }
            for each in measured["bases"]
        ],
        "start": {way: _medians(runs) for way, runs in measured["start"].items()},
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = ("secondsToLoaded", "secondsToFirstStep", "readBytes", "peakBytes")
    return {name: median(run[name] for run in runs) for name in names}


def tables(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    found = result["figures"]
    lines = head("Quantizing a weight of 4096 × 4096", "MB/s of 16-bit weights", "Memory besides, × the weight")
    for name, label in NAMES.items():
        each = found["quantizer"][name]
        lines.append(row(label, f"{each['bytesPerSecond'] / MB:,.0f}", f"{each['timesTheWeight']:.1f}"))
    lines += ["", *head("Making a whole base", "16 bit, GB", "Base, GB", "Seconds", "Memory above the libraries, MiB")]
    for each in found["bases"]:
        lines.append(
            row(
                f"{each['name']}, {each['parameters'] / GB:.2f}B",
                f"{each['originalBytes'] / GB:.2f}",
                f"{each['baseBytes'] / GB:.2f}",
                f"{each['seconds']:.0f}",
                f"{each['aboveLibrariesBytes'] / MIB:,.0f}",
            )
        )
    columns = ("Seconds until it is loaded", "Until the first optimizer step", "Read from disk, MiB", "Peak, MiB")
    lines += ["", *head(f"SmolLM2-135M, files not in memory, {result['repetitions']} starts each", *columns)]
    for way, label in WAYS.items():
        each = found["start"][way]
        lines.append(
            row(
                label,
                f"{each['secondsToLoaded']:.1f}",
                f"{each['secondsToFirstStep']:.1f}",
                f"{each['readBytes'] / MIB:,.0f}",
                f"{each['peakBytes'] / MIB:,.0f}",
            )
        )
    return "\n".join(lines) + "\n"
