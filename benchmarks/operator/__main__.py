"""Measures the operator under one of several loads; writes `results/operator-LOAD.json`.

The tables of `results/operator.md` are written too, unless the result goes elsewhere. Each load has its own etcd, API
server and controller manager on this machine.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.machine import RESULTS, describe_machine, write_result
from benchmarks.operator import arrival, day, neighbor, progress, simulation, table, year

LIBRARIES = ("aiohttp", "kopf", "kubernetes", "pydantic")
LOADS = {
    "arrival": arrival,
    "progress": progress,
    "neighbor": neighbor,
    "day": day,
    "simulation": simulation,
    "year": year,
}
"""Each module has `add_options`, `measure` and `tables`."""


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    loads = parser.add_subparsers(dest="load", required=True, metavar="LOAD")
    for name, load in LOADS.items():
        description = load.__doc__ or ""
        options = loads.add_parser(name, help=description.partition("\n")[0], description=description)
        load.add_options(options)
        options.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    chosen = parser.parse_args()
    load = LOADS[chosen.load]
    result = {"machine": describe_machine(LIBRARIES), **load.measure(chosen)}
    path = write_result(f"operator-{chosen.load}", result, chosen.output)
    tables = load.tables(json.loads(path.read_text()))
    print(f"\n{tables}\n{path}")
    if chosen.output == RESULTS:
        table.write(chosen.load, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
