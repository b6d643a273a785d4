"""Compares this trainer with TRL and with the original recipe; writes `results/speed.json` and prints the table.

Each system runs in a separate process, repeatedly in turn, so that a slow moment of the machine hits all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.machine import RESULTS, describe_machine, write_result
from benchmarks.speed.settings import (
    HELD_OUT_ROWS,
    SEED,
    SYSTEMS,
    TARGET_LOSS,
    TRAIN_ROWS,
    Inputs,
    SystemName,
    describe_settings,
)
from benchmarks.speed.summary import compare, figures, table
from examples.demo.__main__ import model_folder
from qlora_trainer.core.cpu import preloaded_allocator

# The same for all.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Waiting of threads (by default they spin, which is fastest on an idle machine), and the memory allocator.
LEFT_TO_EACH = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LD_PRELOAD")


def main() -> int:
    """Measure, write and print; returns the exit code."""
    options = _parser().parse_args()
    machine, model = describe_machine(), model_folder()
    with tempfile.TemporaryDirectory(prefix="qlora-speed-") as scratch:
        inputs = Inputs(Path(scratch), model, recomputes=not options.keep_activations)
        write_conversations(inputs.train, TRAIN_ROWS, SEED, CHAT)
        write_conversations(inputs.held_out, HELD_OUT_ROWS, SEED + 1, CHAT)
        measured: dict[SystemName, list[dict[str, Any]]] = {system: [] for system in options.systems}
        for repetition in range(options.repetitions):
            for system in options.systems:
                print(f"{system}, {repetition + 1} of {options.repetitions}", file=sys.stderr, flush=True)
                # As the operator and `qlora run` start this trainer.
                allocator = preloaded_allocator({}) if system == "ours" or options.same_allocator else {}
                folder = Path(scratch) / f"{system}-{repetition}"
                measured[system].append(_run(system, inputs, options.steps, folder, allocator))
        base_loss = _evaluate(inputs, measured)
    all_figures = {system: figures(measured[system], base_loss, TARGET_LOSS) for system in options.systems}
    comparisons = compare(all_figures)
    result = {
        "machine": machine,
        "settings": describe_settings() | {"recomputesActivations": inputs.recomputes},
        "length": {"steps": options.steps},
        "environment": ENVIRONMENT,
        "baseEvalLoss": base_loss,
        "measured": measured,
        "figures": {system: asdict(system_figures) for system, system_figures in all_figures.items()},
        "comparisons": [{**asdict(one), "met": one.met} for one in comparisons],
    }
    print(table(all_figures, comparisons))
    print(f"\n{write_result('speed', result, options.output)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each system (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="only these")
    parser.add_argument("--same-allocator", action="store_true", help="give this trainer's allocator to the others too")
    parser.add_argument("--keep-activations", action="store_true", help="recompute none in the backward pass")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    return parser


def _run(
    system: SystemName, inputs: Inputs, steps: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure one run in a new process.

    Raises CalledProcessError with its output printed.
    """
    folder.mkdir()
    (folder / inputs.train.name).hardlink_to(inputs.train)
    command = ["benchmarks.speed.worker", system, str(folder), str(inputs.model), f"--steps={steps}"]
    command += [] if inputs.recomputes else ["--keep-activations"]
    _checked(command, environment=environment)
    measured: dict[str, Any] = json.loads((folder / "measured.json").read_text())
    return measured | {"snapshots": [str(folder / f"step-{step + 1}.pt") for step in range(steps)]}


def _evaluate(inputs: Inputs, measured: dict[SystemName, list[dict[str, Any]]]) -> float:
    """Give each repetition the `evalLosses` of the first, as all compute the same."""
    asked = "".join(
        json.dumps({"system": system, "snapshots": runs[0]["snapshots"]}) + "\n" for system, runs in measured.items()
    )
    losses = json.loads(_checked(["benchmarks.speed.evaluate", str(inputs.model), str(inputs.held_out)], asked))
    for runs in measured.values():
        of_steps = {str(step): losses[path] for step, path in enumerate(runs[0]["snapshots"], start=1)}
        for run in runs:
            del run["snapshots"]
            run["evalLosses"] = of_steps
    return float(losses["base"])


def _checked(module: Sequence[str], given: str = "", environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """The module's output, for its arguments and `given` on standard input."""
    inherited = {name: value for name, value in os.environ.items() if name not in LEFT_TO_EACH}
    done = subprocess.run(
        [sys.executable, "-m", *module],
        input=given,
        capture_output=True,
        text=True,
        env={**inherited, **ENVIRONMENT, **environment},
        check=False,
    )
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        done.check_returncode()
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
