"""Runs one system once, in a separate process, and writes the measurement.

python -m benchmarks.speed.worker SYSTEM FOLDER MODEL --steps N
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import describe_environment
from benchmarks.memory import peak_resident_bytes
from benchmarks.speed.settings import SYSTEMS, Inputs

if TYPE_CHECKING:
    from benchmarks.speed.instrument import Instrument


def main() -> None:
    """Train with the named system, write measured.json and step-N.pt to FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--keep-activations", action="store_true")
    options = parser.parse_args()
    if options.system == "ours":
        from qlora_trainer.core.process import set_environment

        # As a step does, before PyTorch is imported: OpenMP reads its settings when it is loaded and never again.
        set_environment("train", options.folder)

    import torch

    from benchmarks.speed.instrument import Instrument

    instrument = Instrument(options.steps, options.folder)
    inputs = Inputs(options.folder, options.model, recomputes=not options.keep_activations)
    tokens, rows = _train(options.system, inputs, instrument)
    measured = instrument.result(tokens, rows) | {
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
        "peakBytes": max(instrument.loaded["peakBytes"], peak_resident_bytes()),
    }
    (options.folder / "measured.json").write_text(json.dumps(measured))


def _train(system: str, inputs: Inputs, instrument: "Instrument") -> tuple[list[int], list[int]]:
    # Imported where it runs: no system pays for the libraries of another.
    if system == "ours":
        from benchmarks.speed import ours

        return ours.train(inputs, instrument)
    if system == "original":
        from benchmarks.speed import original

        return original.train(inputs, instrument)
    from benchmarks.speed import trl

    return trl.train(inputs, instrument, packing=system == "trl-packing")


if __name__ == "__main__":
    main()
