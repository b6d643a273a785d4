"""Measures the overhead of the training loop beyond forward and backward; writes `results/loop.json`.

The real train step runs; before or after each of its optimizer steps, in turn, the same batches go through a bare
forward and backward pass of the same model, so that both are measured in one process and neither is always the first.
The loop's time holds everything else that a step does: reading data, clipping, checks, the optimizer, the history and
reports. Python collects garbage as it does in a pod.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal
from unittest.mock import patch

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.machine import RESULTS, describe_machine, write_result
from benchmarks.speed.settings import ALPHA, MAX_LENGTH, RANK, SEED
from benchmarks.trainer import prepared_context, train_here
from examples.demo.__main__ import model_folder

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

    def minus(self, earlier: "Span") -> "Span":
        """The difference of both clocks."""
        return Span(self.seconds - earlier.seconds, self.cpu_seconds - earlier.cpu_seconds)


@dataclass(frozen=True)
class Pair:
    """A step of the loop and the bare passes over its batches."""

    first: Literal["loop", "bare"]
    loop: Span
    """From the end of the step before: the report of a step counts in the next one."""
    optimizer: Span
    """The part of `loop` in the optimizer."""
    bare: Span


@dataclass
class Alternation:
    """Runs bare passes over a step's batches, in turn before and after the step."""

    share: Callable[..., list[tuple[Any, bool]]]
    """The loop's function that reads the batches of its next step."""
    bare_passes: Callable[[Any, list[Any]], Span]
    """Forward and backward passes of a run's model over batches, and their time."""
    pairs: list[Pair] = field(default_factory=list)
    _run: Any = None
    _batches: list[Any] = field(default_factory=list)
    _began: Span | None = None
    """None in the first step, which has one-time costs."""
    _optimizer_began: Span = Span(0.0, 0.0)
    _bare: Span | None = None
    _paused: Span = Span(0.0, 0.0)
    """Time inside of the step that does not belong to it."""

    def read(self, run: Any, *arguments: Any) -> list[tuple[Any, bool]]:
        """Replace the loop's reading, keep its batches, and alternate with bare passes."""
        shared = self.share(run, *arguments)
        self._run, self._batches = run, [batch for batch, _ in shared]
        if self._began is not None and len(self.pairs) % 2:
            began = Span.now()
            self._bare = self.bare_passes(run, self._batches)
            self._paused = Span.now().minus(began)
        return shared

    def before_optimizer(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        """The optimizer begins."""
        self._optimizer_began = Span.now()

    def after_optimizer(self, _optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        """A step of the loop is done, but for its report."""
        now = Span.now()
        if self._began is not None:
            loop = now.minus(self._began).minus(self._paused)
            optimizer = now.minus(self._optimizer_began)
            first: Literal["loop", "bare"] = "loop" if self._bare is None else "bare"
            bare = self.bare_passes(self._run, self._batches) if self._bare is None else self._bare
            self.pairs.append(Pair(first, loop, optimizer, bare))
        self._bare, self._paused = None, Span(0.0, 0.0)
        self._began = Span.now()


def bare_passes(run: Any, batches: list[Any]) -> Span:
    """Run only the loop's forward and backward passes, and leave no gradient behind."""
    import torch

    from qlora_trainer.model.losses.loss import batch_loss
    from qlora_trainer.model.nf4.quantization import BASE_DTYPE

    run.optimizer.zero_grad(set_to_none=True)
    began = Span.now()
    for batch in batches:
        with torch.autocast(run.device.type, dtype=BASE_DTYPE, cache_enabled=False):
            loss = batch_loss(run.model.get_base_model(), batch)
        loss.backward()
    passed = Span.now().minus(began)
    run.optimizer.zero_grad(set_to_none=True)
    return passed


@contextmanager
def alternating() -> Iterator[Alternation]:
    """Listen to the training loop that runs in the body.

    PyTorch must not be loaded before its settings are made.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from qlora_trainer.training import loop

    alternation = Alternation(loop._share, bare_passes)
    hooks = [
        register_optimizer_step_pre_hook(alternation.before_optimizer),
        register_optimizer_step_post_hook(alternation.after_optimizer),
    ]
    try:
        with patch.object(loop, "_share", alternation.read):
            yield alternation
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Overhead:
    """Quartiles of the loop's overhead over the bare passes, as a share of these."""

    lower_quartile: float
    median: float
    upper_quartile: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Overhead":
        """Return the overhead by `ratios` of steps to bare passes, from two pairs on."""
        return cls(*(ratio - 1 for ratio in quantiles(ratios, n=4, method="inclusive")))


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="pairs to measure (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}: must be at least 2, since quartiles are told")
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="qlora-loop-") as scratch:
        pairs = _measure(Path(scratch), options.steps)
    figures = overhead(pairs)
    result = {
        "machine": machine,
        "pairs": [asdict(pair) for pair in pairs],
        "overhead": {clock: asdict(value) for clock, value in figures.items()},
        "target": TARGET,
    }
    for clock, value in figures.items():
        print(
            f"overhead of the loop by {clock}: {value.median:.2%}, quartiles {value.lower_quartile:.2%} and "
            f"{value.upper_quartile:.2%} (target: at most {TARGET:.0%})"
        )
    print(f"\n{write_result('loop', result, options.output)}")
    return 0


def overhead(pairs: Sequence[Pair]) -> dict[str, Overhead]:
    """By either clock, and by processor time without the optimizer."""
    return {
        "wall time": Overhead.of([pair.loop.seconds / pair.bare.seconds for pair in pairs]),
        "processor time": Overhead.of([pair.loop.cpu_seconds / pair.bare.cpu_seconds for pair in pairs]),
        "processor time without the optimizer": Overhead.of(
            [pair.loop.minus(pair.optimizer).cpu_seconds / pair.bare.cpu_seconds for pair in pairs]
        ),
    }


def _measure(folder: Path, steps: int) -> list[Pair]:
    write_conversations(folder / "train.jsonl", ROWS, SEED, CHAT)
    training = {
        "maxSteps": WARM_UP_STEPS + steps,
        "gradientAccumulationSteps": SEQUENCES_PER_STEP,
        "maxSequenceLength": MAX_LENGTH,
        "trainOn": "all",
        "samples": 0,
    }
    context = prepared_context(folder, model_folder(), training, {"rank": RANK, "alpha": ALPHA})
    with alternating() as alternation:
        train_here(context)
    return alternation.pairs


if __name__ == "__main__":
    sys.exit(main())
