"""Measures a training run from outside, the same way for every system: PyTorch itself reports when a step is done."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.memory import forget_peak, peak_resident_bytes, release_freed, resident_bytes


@dataclass
class Instrument:
    """Notes memory before the first forward pass, and time, processor time and memory after each optimizer step.

    Snapshots of the trained parameters are written while the clocks stand still.
    """

    total_steps: int
    """Optimizer steps of the run."""
    snapshots: Path
    """Folder for `step-N.pt`: the optimizer's parameters, in its order."""
    started: float = 0.0
    paused: float = 0.0
    paused_cpu: float = 0.0
    loaded: dict[str, int] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)

    def install(self) -> None:
        """Begin to listen. The first forward pass of any module ends the loading."""
        handles: list[Any] = []

        def first_forward(_module: torch.nn.Module, _arguments: Any) -> None:
            handles.pop().remove()
            # Memory that loading has freed but the allocator still holds is not needed by the loaded model.
            release_freed()
            self.loaded = {"residentBytes": resident_bytes(), "peakBytes": peak_resident_bytes()}
            forget_peak()
            self.started, self.paused_cpu = time.monotonic(), time.process_time()

        handles.append(register_module_forward_pre_hook(first_forward))
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        wall, cpu = time.monotonic(), time.process_time()
        self.steps.append(
            {
                "seconds": wall - self.started - self.paused,
                "cpuSeconds": cpu - self.paused_cpu,
                "peakBytes": peak_resident_bytes(),
            }
        )
        parameters = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
        torch.save(parameters, self.snapshots / f"step-{len(self.steps)}.pt")
        self.paused += time.monotonic() - wall
        self.paused_cpu += time.process_time() - cpu

    def result(self, tokens: list[int], rows: list[int]) -> dict[str, Any]:
        """Return the measurement with each step's useful `tokens` and `rows`."""
        if not len(self.steps) == len(tokens) == len(rows):
            raise AssertionError(f"{len(self.steps)} steps measured, tokens of {len(tokens)}, rows of {len(rows)}")
        described = [
            {**step, "tokens": step_tokens, "rows": step_rows}
            for step, step_tokens, step_rows in zip(self.steps, tokens, rows, strict=True)
        ]
        return {"loaded": self.loaded, "steps": described}


Train = Callable[[], tuple[list[int], list[int]]]
"""Trains, and returns the useful tokens and the rows of each step."""
