"""Measures how fast the operator starts many new jobs, and at what cost; writes `results/operator.json`.

The tables of docs/concepts/scale.md are written too, unless the result goes elsewhere.
Each run has its own etcd, API server and controller manager on this machine. No pod is scheduled: a job has its first
Job and its status, and waits. The floor of the same run is a script that creates the same claim and Job and does
nothing else.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.inputs import RESULTS, write_result
from benchmarks.machine import describe_machine
from benchmarks.operator import table
from benchmarks.operator.run import Subject, measure

LIBRARIES = ("aiohttp", "kopf", "kubernetes", "pydantic")


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[500, 1000], help="jobs of each run (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, in turn (%(default)s)")
    parser.add_argument("--workers", type=int, help="the operator's workers, if not its default")
    parser.add_argument("--no-floor", action="store_true", help="leave the floor out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine = describe_machine(LIBRARIES)
    subjects: tuple[Subject, ...] = ("operator",) if options.no_floor else ("operator", "floor")
    runs = []
    for jobs in options.jobs:
        for _ in range(options.repetitions):
            for subject in subjects:
                print(f"{subject}: {jobs} jobs", file=sys.stderr, flush=True)
                runs.append({"subject": subject} | measure(subject, jobs, options.workers))
                print(json.dumps(runs[-1], indent=2), flush=True)
    result = {"machine": machine, "runs": runs}
    path = write_result("operator", result, options.output)
    print(f"\n{table.figures(result)}\n{path}")
    if options.output == RESULTS:
        table.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
