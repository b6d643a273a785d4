"""Measures what the training loop costs beyond forward and backward; writes `results/loop.json`.

The real train step runs; after each of its optimizer steps the same batches go through a bare forward and backward pass
of the same model, so that both are measured in turn in one process. The loop's time holds everything else that a step
does: reading data, clipping, checks, the optimizer, the history and reports.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.inputs import RESULTS, model_folder, write_result
from benchmarks.machine import describe_machine
from benchmarks.speed.settings import ALPHA, MAX_LENGTH, RANK, SEED
from benchmarks.trainer import prepared_context, train_here

TARGET = 0.02
SEQUENCES_PER_STEP = 4
ROWS = 400
WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Span:
    """Seconds of wall and of processor time (user and system, all threads)."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> "Span":
        """Both clocks."""
        return cls(time.monotonic(), time.process_time())

    def since(self, earlier: "Span") -> "Span":
        """What has passed."""
        return Span(self.seconds - earlier.seconds, self.cpu_seconds - earlier.cpu_seconds)


@dataclass
class Pairs:
    """The steps of the loop and, after each, the bare passes over its batches."""

    batch_loss: Callable[[Any, Any], Any]
    """The loop's own, through which model and batches are seen."""
    loop: list[Span] = field(default_factory=list)
    optimizer: list[Span] = field(default_factory=list)
    bare: list[Span] = field(default_factory=list)
    _seen: list[tuple[Any, Any]] = field(default_factory=list)
    _began: Span | None = None
    _optimizer_began: Span | None = None

    def loss(self, model: Any, batch: Any) -> Any:
        """In place of the loop's loss: the same, remembered."""
        self._seen.append((model, batch))
        return self.batch_loss(model, batch)

    def before_optimizer(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        """The optimizer begins."""
        self._optimizer_began = Span.now()

    def after_optimizer(self, optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        """A step of the loop is done, but for its report, which counts in the next one."""
        now = Span.now()
        if self._began is not None and self._optimizer_began is not None:
            self.loop.append(now.since(self._began))
            self.optimizer.append(now.since(self._optimizer_began))
            self.bare.append(self._bare_passes(optimizer))
        self._seen.clear()
        self._began = Span.now()

    def _bare_passes(self, optimizer: Any) -> Span:
        import torch

        optimizer.zero_grad(set_to_none=True)
        began = Span.now()
        for model, batch in self._seen:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.batch_loss(model, batch)
            loss.backward()
        passed = Span.now().since(began)
        optimizer.zero_grad(set_to_none=True)
        return passed


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="pairs to measure (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="qlora-loop-") as scratch:
        pairs = _measure(Path(scratch), options.steps)
    figures = overhead(pairs)
    result = {
        "machine": machine,
        "pairs": [
            {"loop": asdict(loop), "optimizer": asdict(optimizer), "bare": asdict(bare)}
            for loop, optimizer, bare in zip(pairs.loop, pairs.optimizer, pairs.bare, strict=True)
        ],
        "overhead": figures,
        "target": TARGET,
    }
    for clock, value in figures.items():
        print(f"overhead of the loop by {clock}: {value:.2%} (target: at most {TARGET:.0%})")
    print(f"\n{write_result('loop', result, options.output)}")
    return 0


def overhead(pairs: Pairs) -> dict[str, float]:
    """The median of the pairs' ratios, less one: by either clock, and by processor time without the optimizer."""
    cpu = [bare.cpu_seconds for bare in pairs.bare]
    return {
        "wall time": median(loop.seconds / bare.seconds for loop, bare in zip(pairs.loop, pairs.bare, strict=True)) - 1,
        "processor time": median(loop.cpu_seconds / bare for loop, bare in zip(pairs.loop, cpu, strict=True)) - 1,
        "processor time without the optimizer": median(
            (loop.cpu_seconds - optimizer.cpu_seconds) / bare
            for loop, optimizer, bare in zip(pairs.loop, pairs.optimizer, cpu, strict=True)
        )
        - 1,
    }


def _measure(folder: Path, steps: int) -> Pairs:
    write_conversations(folder / "train.jsonl", ROWS, SEED, CHAT)
    training = {
        "maxSteps": WARM_UP_STEPS + steps,
        "gradientAccumulationSteps": SEQUENCES_PER_STEP,
        "maxSequenceLength": MAX_LENGTH,
        "trainOn": "all",
        "samples": 0,
    }
    context = prepared_context(folder, model_folder(), training, {"rank": RANK, "alpha": ALPHA})

    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from qlora_trainer import loop
    from qlora_trainer.loss import batch_loss

    pairs = Pairs(batch_loss)
    register_optimizer_step_pre_hook(pairs.before_optimizer)
    register_optimizer_step_post_hook(pairs.after_optimizer)
    gc.disable()
    with patch.object(loop, "batch_loss", pairs.loss):
        train_here(context)
    return pairs


if __name__ == "__main__":
    sys.exit(main())
