"""Measures the operator under one of several loads; writes `results/operator-LOAD.json`.

The tables of docs/concepts/scale.md are written too, unless the result goes elsewhere. Each load has its own etcd, API
server and controller manager on this machine.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.inputs import RESULTS, write_result
from benchmarks.machine import describe_machine
from benchmarks.operator import arrival, day, progress, simulation

LIBRARIES = ("aiohttp", "kopf", "kubernetes", "pydantic")
LOADS = {"arrival": arrival, "progress": progress, "day": day, "simulation": simulation}


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    loads = parser.add_subparsers(dest="load", required=True, metavar="LOAD")
    for name, load in LOADS.items():
        options = loads.add_parser(name, help=(load.__doc__ or "").partition("\n")[0], description=load.__doc__)
        load.add_options(options)
        options.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    chosen = parser.parse_args()
    machine = describe_machine(LIBRARIES)
    result = {"machine": machine, **LOADS[chosen.load].measure(chosen)}
    path = write_result(f"operator-{chosen.load}", result, chosen.output)
    print(json.dumps(result, indent=1)[-3000:])
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
