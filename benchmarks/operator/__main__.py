"""Measures the operator under one of several loads; writes `results/operator-LOAD.json`.

The tables of `results/operator.md` are written too, unless the result goes elsewhere. Each load has its own etcd, API
server and controller manager on this machine.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.inputs import RESULTS, write_result
from benchmarks.machine import describe_machine
from benchmarks.operator import (
    arrival,
    arrival_table,
    day,
    day_table,
    neighbor,
    neighbor_table,
    progress,
    progress_table,
    simulation,
    simulation_table,
    table,
)

LIBRARIES = ("aiohttp", "kopf", "kubernetes", "pydantic")


@dataclass(frozen=True)
class Load:
    """The part of a load for the command line."""

    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    tables: Callable[[dict[str, Any]], str]


LOADS = {
    "arrival": Load(arrival.__doc__ or "", arrival.add_options, arrival.measure, arrival_table.tables),
    "progress": Load(progress.__doc__ or "", progress.add_options, progress.measure, progress_table.tables),
    "neighbor": Load(neighbor.__doc__ or "", neighbor.add_options, neighbor.measure, neighbor_table.tables),
    "day": Load(day.__doc__ or "", day.add_options, day.measure, day_table.tables),
    "simulation": Load(simulation.__doc__ or "", simulation.add_options, simulation.measure, simulation_table.tables),
}


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
    loads = parser.add_subparsers(dest="load", required=True, metavar="LOAD")
    for name, load in LOADS.items():
        help_line = load.description.partition("\n")[0]
        options = loads.add_parser(name, help=help_line, description=load.description)
        load.add_options(options)
        options.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    chosen = parser.parse_args()
    load = LOADS[chosen.load]
    machine = describe_machine(LIBRARIES)
    result = {"machine": machine, **load.measure(chosen)}
    path = write_result(f"operator-{chosen.load}", result, chosen.output)
    tables = load.tables(json.loads(path.read_text()))
    print(f"\n{tables}\n{path}")
    if chosen.output == RESULTS:
        table.write(chosen.load, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
