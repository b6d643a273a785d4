"""Describes the machine, the libraries and the code behind the figures, and writes these."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets", "numpy", "tokenizers")
# Variables that decide threads and memory allocation in a process.
VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_TOP_PAD_",
    "THP_MEM_ALLOC_ENABLE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LD_PRELOAD",
)
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Machine:
    """The conditions of the figures."""

    processor: str
    instructions: tuple[str, ...]
    """Those that decide the speed of 16-bit products."""
    cores: int
    memory_bytes: int
    kernel: str
    """Its version, without a distributor's suffix behind the first dash."""
    python: str
    libraries: dict[str, str | None]
    environment: dict[str, str | None]
    load: tuple[float, float, float]
    """Load average of the last 1, 5 and 15 minutes: figures of a busy machine are worth little."""
    commit: str | None
    """The commit that is checked out; None outside of a checkout."""
    changed: bool | None
    """Whether a tracked file differs from that commit, results apart; None outside of a checkout."""


def describe_machine(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """This machine, now, and the versions of these libraries."""
    lines = dict(_pairs(Path("/proc/cpuinfo").read_text()))
    flags = lines.get("flags", "").split()
    model = f"family {lines.get('cpu family')} model {lines.get('model')}"
    commit, changed = describe_checkout(ROOT)
    return asdict(
        Machine(
            processor=f"{lines.get('model name', 'unknown')}, {model}",
            instructions=tuple(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            kernel=platform.release().partition("-")[0],
            python=platform.python_version(),
            libraries=describe_libraries(libraries),
            environment=describe_environment(),
            load=os.getloadavg(),
            commit=commit,
            changed=changed,
        )
    )


def describe_libraries(names: Sequence[str]) -> dict[str, str | None]:
    """Return the versions of the libraries, None if not installed."""
    return {name: _version(name) for name in names}


def describe_environment() -> dict[str, str | None]:
    """Return the variables that decide threads and memory allocation, None if unset."""
    return {name: os.environ.get(name) for name in VARIABLES}


def describe_checkout(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit at `root` and whether tracked files differ, or None twice."""
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    top, commit = found.splitlines() if found else ("", None)
    # Otherwise the code is a copy inside of another project's checkout.
    if commit is None or Path(top).resolve() != root.resolve():
        return None, None
    # Benchmarks write their results and tables one after the other; they are no change of the code.
    written = (f":(exclude){RESULTS.relative_to(ROOT)}", ":(exclude)docs")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return commit, None if changes is None else bool(changes)


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result as `<name>.json`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _git(root: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails, or is missing."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
