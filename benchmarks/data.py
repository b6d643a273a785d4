"""Measures how fast the prepare step turns rows into packed tokens, and in how much memory; writes `results/data.json`.

The command line runs as in a pod, on a file of short conversations from a fixed seed; its process and their children
are watched from outside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.conversations import SHORT_CHAT, write_conversations
from benchmarks.machine import RESULTS, describe_machine, write_result
from benchmarks.memory import anonymous_bytes, resident_bytes, shared_bytes
from benchmarks.speed.settings import MAX_LENGTH, SEED
from benchmarks.trainer import prepare_command
from examples.demo.__main__ import model_folder

SECONDS_BETWEEN_SAMPLES = 0.2


@dataclass(frozen=True)
class Sample:
    """Summed memory of a process and its descendants, shared pages once for each."""

    seconds: float
    """Since the start."""
    resident_bytes: int
    """All of it. The rest besides anonymous and shared memory is content of mapped files, which the kernel can drop."""
    anonymous_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Watched:
    """Time and memory of a process and its descendants."""

    seconds: float
    cpu_seconds: float
    """User and system, of all."""
    peak_bytes: int
    """The largest sum of their resident memory."""
    peak_anonymous_bytes: int
    peak_shared_bytes: int
    samples: tuple[Sample, ...]


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine, model = describe_machine(), model_folder()
    with tempfile.TemporaryDirectory(prefix="qlora-data-") as scratch:
        folder = Path(scratch)
        print(f"writing {options.rows} rows", file=sys.stderr, flush=True)
        write_conversations(folder / "train.jsonl", options.rows, SEED, SHORT_CHAT)
        size = (folder / "train.jsonl").stat().st_size
        command = prepare_command(folder, model, {"maxSteps": 1, "maxSequenceLength": MAX_LENGTH}, {})
        with (folder / "output").open("w") as output:
            watched = watch(command, output)
        dataset = json.loads((folder / "output").read_text().splitlines()[-1])["dataset"]
    result = {
        "machine": machine,
        "rows": options.rows,
        "fileBytes": size,
        "dataset": dataset,
        "watched": asdict(watched),
        "figures": _figures(watched, dataset, machine["cores"]),
    }
    print(json.dumps(result["figures"], indent=2))
    print(f"\n{write_result('data', result, options.output)}")
    return 0


def _figures(watched: Watched, dataset: dict[str, Any], cores: int) -> dict[str, float]:
    return {
        "rowsPerSecond": round(dataset["usedRows"] / watched.seconds, 1),
        "tokensPerSecond": round(dataset["tokens"] / watched.seconds, 1),
        "seconds": round(watched.seconds, 1),
        "peakMiB": round(watched.peak_bytes / 2**20, 1),
        "peakAnonymousMiB": round(watched.peak_anonymous_bytes / 2**20, 1),
        "peakSharedMiB": round(watched.peak_shared_bytes / 2**20, 1),
        "shareOfCores": round(watched.cpu_seconds / watched.seconds / cores, 3),
    }


def watch(command: list[str], output: Any) -> Watched:
    """Run a command and sample it and its descendants until it ends.

    Raises CalledProcessError if it fails.
    """
    started, samples, before = time.monotonic(), list[Sample](), os.times()
    with subprocess.Popen(command, env={**os.environ, "QLORA_DEVICE": "cpu"}, stdout=output) as process:
        while process.poll() is None:
            held = [_held(member) for member in (process.pid, *descendants(process.pid))]
            samples.append(Sample(round(time.monotonic() - started, 2), *map(sum, zip(*held, strict=True))))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    seconds, after = time.monotonic() - started, os.times()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Watched(
        seconds,
        cpu,
        max(sample.resident_bytes for sample in samples),
        max(sample.anonymous_bytes for sample in samples),
        max(sample.shared_bytes for sample in samples),
        tuple(samples),
    )


def descendants(process: int) -> list[int]:
    """Its running descendants."""
    found = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            numbers = [int(number) for number in children.read_text().split()]
        except OSError:
            continue
        for number in numbers:
            found += [number, *descendants(number)]
    return found


def _held(process: int) -> tuple[int, int, int]:
    """Its resident, anonymous and shared memory; none if it has ended."""
    try:
        return resident_bytes(process), anonymous_bytes(process), shared_bytes(process)
    except OSError:
        return 0, 0, 0


if __name__ == "__main__":
    sys.exit(main())
