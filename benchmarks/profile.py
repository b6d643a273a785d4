"""Profiles a training step; writes `results/profile.md`.

The real train step runs. Its middle steps are measured by phase, with clocks around the model's parts, and its last one
by operation, with PyTorch's profiler, which slows it down.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.inputs import RESULTS, model_folder
from benchmarks.machine import describe_machine
from benchmarks.speed.settings import ALPHA, MAX_LENGTH, RANK, SEED
from benchmarks.trainer import prepared_context, train_here

ROWS = 200
STEPS = 4
SHOWN_OPERATIONS = 25
KINDS: Mapping[str, tuple[str, ...]] = {
    "dequantization": ("bitsandbytes::dequantize", "bitsandbytes::gemm"),
    "optimizer": ("bitsandbytes::optimizer",),
    "attention": ("attention",),
    "matmuls": ("aten::mm", "aten::addmm", "aten::bmm"),
    "softmax of the loss": ("log_softmax", "nll_loss"),
    "copies and casts": ("aten::copy_", "aten::clone", "aten::cat", "aten::fill_"),
}
"""The kind of an operation, by a part of its name; the first match counts."""
REST = "elementwise and bookkeeping"

Operation = tuple[str, float, int]
"""Name, seconds without the operations inside it, calls."""


@dataclass
class Phases:
    """Processor seconds of each phase, of all measured steps."""

    batch_loss: Callable[[Any, Any], Any]
    summed_loss: Callable[..., Any]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    measuring: bool = False
    _phase: str = ""
    _since: float = 0.0
    _watched: bool = False

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        now = time.process_time()
        if self.measuring and self._phase:
            self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def loss(self, model: Any, batch: Any) -> Any:
        """The loop's loss of a batch; what follows it is the backward pass."""
        if not self._watched:
            self._watch_blocks(model)
        self.enter("forward")
        loss = self.batch_loss(model, batch)
        self.enter("backward")
        return loss

    def head(self, *arguments: Any, **keywords: Any) -> Any:
        """The output layer and the loss."""
        self.enter("output layer and loss")
        return self.summed_loss(*arguments, **keywords)

    def _watch_blocks(self, model: Any) -> None:
        """Mark a block's forward work in the backward pass as recomputation, for its checkpoint.

        Its parts are watched: hooks of the block itself stay outside the checkpoint.
        """

        def before(_part: Any, _arguments: Any) -> None:
            if self._phase == "backward":
                self.enter("recomputation")

        def after(_part: Any, _arguments: Any, _output: Any) -> None:
            if self._phase == "recomputation":
                self.enter("backward")

        for part in (part for block in model.get_decoder().layers for part in block.children()):
            part.register_forward_pre_hook(before)
            # The recomputation ends by an exception, as soon as it has all that backward needs.
            part.register_forward_hook(after, always_call=True)
        self._watched = True


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="qlora-profile-") as scratch:
        phases, operations = _measure(Path(scratch))
    text = _text(machine, phases, operations)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "profile.md").write_text(text)
    print(text)
    return 0


def _measure(folder: Path) -> tuple[Phases, list[Operation]]:
    write_conversations(folder / "train.jsonl", ROWS, SEED, CHAT)
    training = {
        "maxSteps": STEPS,
        "gradientAccumulationSteps": 1,
        "maxSequenceLength": MAX_LENGTH,
        "trainOn": "all",
        "samples": 0,
    }
    context = prepared_context(folder, model_folder(), training, {"rank": RANK, "alpha": ALPHA})

    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from torch.profiler import ProfilerActivity, profile

    from qlora_trainer.model.losses import loss
    from qlora_trainer.training import objective

    phases = Phases(loss.batch_loss, loss.summed_loss)
    profiler, steps = profile(activities=[ProfilerActivity.CPU]), count(1)

    def before_optimizer(_optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        phases.enter("optimizer")

    def after_optimizer(_optimizer: Any, _arguments: Any, _keywords: Any) -> None:
        phases.enter("between steps")
        phases.steps += phases.measuring
        done = next(steps)
        phases.measuring = done < STEPS - 1
        if done == STEPS - 1:
            profiler.start()
        if done == STEPS:
            profiler.stop()

    register_optimizer_step_pre_hook(before_optimizer)
    register_optimizer_step_post_hook(after_optimizer)
    with patch.object(objective, "batch_loss", phases.loss), patch.object(loss, "summed_loss", phases.head):
        train_here(context)
    return phases, [
        (event.key, event.self_cpu_time_total / 1e6, event.count)
        for event in sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    ]


def kinds(operations: Sequence[Operation]) -> dict[str, float]:
    """Seconds by kind of operation, the largest first."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds, _ in operations:
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)
        sums[kind] += seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _text(machine: dict[str, Any], phases: Phases, operations: Sequence[Operation]) -> str:
    setting = (
        f"One packed sequence of {MAX_LENGTH} tokens per step, SmolLM2-135M, rank {RANK}, every token a target. "
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['libraries']['torch']}, "
        f"commit {machine['commit']}{' with changed files' if machine['changed'] else ''}. "
        "Written by `python -m benchmarks.profile`."
    )
    by_phase = dict(sorted(phases.seconds.items(), key=lambda item: -item[1]))
    lines = [
        "# Where the time of a training step goes",
        "",
        setting,
        "",
        "## By phase (processor seconds per step)",
        "",
        *_shares({name: seconds / phases.steps for name, seconds in by_phase.items()}),
        "",
        "## By kind of operation (seconds of one step under the profiler)",
        "",
        *_shares(kinds(operations)),
        "",
        "## By operation",
        "",
        "| operation | seconds | calls |",
        "|---|---|---|",
        *(f"| `{name}` | {seconds:.3f} | {calls} |" for name, seconds, calls in operations[:SHOWN_OPERATIONS]),
    ]
    return "\n".join(lines) + "\n"


def _shares(seconds: Mapping[str, float]) -> list[str]:
    total = sum(seconds.values())
    rows = [f"| {name} | {value:.2f} | {value / total:.0%} |" for name, value in seconds.items()]
    return ["| | seconds | share |", "|---|---|---|", *rows, f"| all | {total:.2f} | |"]


if __name__ == "__main__":
    sys.exit(main())
