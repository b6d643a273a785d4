"""Measures goodput under preemption: a train step that is ended every ten minutes; writes `results/goodput.json`.

Each attempt is a separate process, started as in a pod, and ended by SIGTERM, as by a preemption, or by SIGKILL, as
by a node that is lost. Its time is taken here, from the start of the process to its end; the share that the trainer
reports is compared with it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.inputs import RESULTS, model_folder, write_result
from benchmarks.machine import describe_environment, describe_machine
from benchmarks.speed.settings import ALPHA, MAX_LENGTH, RANK, SEED
from benchmarks.trainer import WORKSPACE, prepare_command

TARGET = 0.95
SIGNALS = ("TERM", "KILL")
ROWS = 400
SEQUENCES_PER_STEP = 4
SAVE_EVERY_STEPS = 5


@dataclass(frozen=True)
class Attempt:
    """One process of the train step."""

    seconds: float
    """From its start to its end."""
    exit_code: int


@dataclass(frozen=True)
class Outcome:
    """A run that was ended repeatedly by one signal."""

    signal: str
    attempts: tuple[Attempt, ...]
    reported: float
    """Goodput as the trainer reports it."""
    kept_seconds: float
    """Of the optimizer steps and evaluations in the adapter, as its last checkpoint has them."""

    @property
    def measured(self) -> float:
        """Kept time as a share of the processes' time."""
        return self.kept_seconds / sum(attempt.seconds for attempt in self.attempts)


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=__doc__)
    parser.add_argument("--every", type=float, default=600.0, help="seconds of an attempt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS, help="how attempts are ended")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine = describe_machine()
    outcomes = [_run(name, options.every, options.steps) for name in options.signals]
    result = {
        "machine": machine,
        "environment": describe_environment(),
        "everySeconds": options.every,
        "steps": options.steps,
        "saveEverySteps": SAVE_EVERY_STEPS,
        "runs": [asdict(outcome) | {"measured": outcome.measured} for outcome in outcomes],
        "target": TARGET,
    }
    for outcome in outcomes:
        print(
            f"SIG{outcome.signal} every {options.every:.0f} s, {len(outcome.attempts)} attempts: goodput "
            f"{outcome.measured:.1%}, reported {outcome.reported:.1%} (target: at least {TARGET:.0%})"
        )
    print(f"\n{write_result('goodput', result, options.output)}")
    return 0


def _run(signal_name: str, every: float, steps: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="qlora-goodput-") as scratch:
        folder = Path(scratch)
        write_conversations(folder / "train.jsonl", ROWS, SEED, CHAT)
        training = {
            "maxSteps": steps,
            "gradientAccumulationSteps": SEQUENCES_PER_STEP,
            "maxSequenceLength": MAX_LENGTH,
            "saveEverySteps": SAVE_EVERY_STEPS,
            "samples": 0,
        }
        command = prepare_command(folder, model_folder(), training, {"rank": RANK, "alpha": ALPHA})
        environment = {**os.environ, "QLORA_DEVICE": "cpu"}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        train = [word if word != "prepare" else "train" for word in command]
        attempts = [_attempt(train, environment, signal_name, every)]
        workspace = folder / WORKSPACE
        while attempts[-1].exit_code != 0:
            before = _checkpoints(workspace)
            attempts.append(_attempt(train, environment, signal_name, every))
            if attempts[-1].exit_code != 0 and _checkpoints(workspace) == before:
                sys.exit(f"an attempt of {every:g} seconds saved no new checkpoint: raise --every")
        record = json.loads((workspace / "records" / "train.json").read_text())
        state = json.loads((workspace / "checkpoints" / f"step-{steps}" / "state.json").read_text())
        return Outcome(signal_name, tuple(attempts), record["goodput"], state["run"]["kept_seconds"])


def _checkpoints(workspace: Path) -> list[str]:
    return sorted(path.name for path in (workspace / "checkpoints").glob("step-*"))


def _attempt(command: list[str], environment: dict[str, str], signal_name: str, every: float) -> Attempt:
    """One process, which is ended after `every` seconds. Raises CalledProcessError if it fails by itself."""
    began = time.monotonic()
    ended = False
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as step:
        try:
            step.wait(timeout=every)
        except subprocess.TimeoutExpired:
            ended = True
            step.send_signal(signal.SIGTERM if signal_name == "TERM" else signal.SIGKILL)
    if step.returncode != 0 and not ended:
        raise subprocess.CalledProcessError(step.returncode, command)
    return Attempt(time.monotonic() - began, step.returncode)


if __name__ == "__main__":
    sys.exit(main())
