"""The environment of this process: CPU cores, start time, trainer version."""

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

_TRAINER = "qlora-operator"
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_PROCESS = Path("/proc/self/stat")
# Of proc(5): the start of the process, in clock ticks since boot. The first two fields end with the last bracket.
_START_TICKS = 22


def available_cpus(quota_file: Path = _CPU_QUOTA, environ: Mapping[str, str] = os.environ) -> int:
    """CPU cores that this process should use: those of OMP_NUM_THREADS, as the operator sets it to the pod's request.

    Without it, the process's affinity and its container's limit, which PyTorch does not look at.
    """
    cpus = len(os.sched_getaffinity(0))
    if environ.get("OMP_NUM_THREADS", "").isdecimal():
        return max(1, min(cpus, int(environ["OMP_NUM_THREADS"])))
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def process_started() -> datetime:
    """When this process started, before the interpreter loaded anything."""
    fields = _PROCESS.read_text().rpartition(")")[2].split()
    after_boot = int(fields[_START_TICKS - 3]) / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot
    return datetime.now(UTC) - timedelta(seconds=age)


def trainer_version() -> str:
    """Version of this program. A release may change rounding, draws or reading."""
    return version(_TRAINER)
