"""Describes the machine and the libraries that figures were measured with."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets", "numpy", "tokenizers")
# What decides threads and memory allocation in a process.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "MALLOC_ARENA_MAX",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LD_PRELOAD",
)


@dataclass(frozen=True)
class Machine:
    """What the figures depend on besides the code."""

    processor: str
    instructions: tuple[str, ...]
    """Those that decide the speed of 16-bit products."""
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    libraries: dict[str, str | None]
    environment: dict[str, str | None]
    load: tuple[float, float, float]
    """Load average of the last 1, 5 and 15 minutes: figures of a busy machine are worth little."""


def describe_machine() -> dict[str, Any]:
    """This machine, now."""
    lines = dict(_pairs(Path("/proc/cpuinfo").read_text()))
    flags = lines.get("flags", "").split()
    model = f"family {lines.get('cpu family')} model {lines.get('model')}"
    return asdict(
        Machine(
            processor=f"{lines.get('model name', 'unknown')}, {model}",
            instructions=tuple(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=platform.release().partition("-")[0],
            python=platform.python_version(),
            libraries={name: _version(name) for name in LIBRARIES},
            environment={name: os.environ.get(name) for name in VARIABLES},
            load=os.getloadavg(),
        )
    )


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
