"""Runs the study of quality from where its results end, and writes the tables and the figure of the documentation.

A run is a line of `results/quality.jsonl`. A run with a line is not repeated, so the study can be stopped at any time
and continued by the same command.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.operator import table
from benchmarks.quality.plan import waiting_cells
from benchmarks.quality.results import FILE, append_run, read_runs
from benchmarks.quality.summary import COMMAND, NAME, claim_table, tables, write_figure
from examples.demo.__main__ import model_folder
from qlora_trainer.core.cpu import library_settings

PAGE = ROOT / "docs" / "trainer" / "quality.md"
MEASUREMENTS = ROOT / "docs" / "trainer" / "measurements.md"
FIGURE = ROOT / "docs" / "images" / "quality.svg"


def main() -> int:
    """Run the remaining cells, as far as time allows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--part", type=int, default=1, help="which part of the study to run (default: %(default)s)")
    parser.add_argument("--parts", type=int, default=1, help="parts that run at the same time (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--output", type=Path, default=FILE, help="file of the results")
    options = parser.parse_args()
    if not 1 <= options.part <= options.parts:
        parser.error(f"--part is {options.part}: must be from 1 to --parts, {options.parts}")
    if options.minutes > 0:
        _run(options.output, options.part - 1, options.parts, options.minutes)
    runs = read_runs(options.output)
    if options.output == FILE and options.parts == 1:
        table.write(NAME, tables(runs), PAGE, COMMAND)
        table.write(NAME, claim_table(runs), MEASUREMENTS, COMMAND)
        write_figure(runs, FIGURE)
    print(tables(runs))
    return 0


def _run(output: Path, part: int, parts: int, minutes: float) -> None:
    """Run one cell after the other, and add each result immediately."""
    os.environ |= library_settings(os.environ)
    import torch

    from benchmarks.quality.cell import Place, run_cell
    from benchmarks.tuning.attention import use_short_rows
    from benchmarks.tuning.data import without_chat_template

    # Several runs at a time use several cores better than one run does, and rounding depends on the number of threads.
    torch.set_num_threads(1)
    use_short_rows()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qlora-quality-") as scratch:
        place = Place(without_chat_template(model_folder(), Path(scratch) / "model"), Path(scratch) / "base")
        while time.monotonic() - began < 60 * minutes:
            cell = next(waiting_cells(read_runs(output), part, parts), None)
            if cell is None:
                return
            run = run_cell(cell, place)
            append_run(run, output)
            print(f"{cell}: {run.score:.3f}, loss {run.loss}, {run.processor_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
