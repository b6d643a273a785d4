"""Reads the processor time and memory of processes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from benchmarks.memory import peak_resident_bytes, resident_bytes

MIB = 2**20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Processes:
    """One process, or several that do one work together."""

    pids: tuple[int, ...]

    def processor_seconds(self) -> float:
        """Their processor time so far."""
        return sum(_processor_seconds(pid) for pid in self.pids)

    def resident_mib(self) -> float:
        """The memory that they hold now."""
        return round(sum(resident_bytes(pid) for pid in self.pids) / MIB, 1)

    def peak_mib(self) -> float:
        """The sum of their peaks."""
        return round(sum(peak_resident_bytes(pid) for pid in self.pids) / MIB, 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum of at least two values."""
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(values), 3)}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
