"""Measures a training run from outside, the same way for every system: PyTorch itself reports when a step is done."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.plan import Workload


@dataclass
class Meter:
    """Notes the time after each optimizer step, waiting for the GPU, then its peaks, and profiles one more step."""

    workload: Workload
    seconds: list[float] = field(default_factory=list)
    """Since the first forward pass."""
    measured: dict[str, Any] = field(default_factory=dict)
    _started: float = 0.0
    _profile: Any = None

    def install(self) -> None:
        """Begin to listen. The first forward pass of any module ends the loading."""
        handles: list[Any] = []

        def first_forward(_module: torch.nn.Module, _arguments: Any) -> None:
            handles.pop().remove()
            if self._on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._started = self._now()

        handles.append(register_module_forward_pre_hook(first_forward))
        register_optimizer_step_post_hook(self._after_step)

    @property
    def _on_gpu(self) -> bool:
        return self.workload.device == "cuda"

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.monotonic()

    def _after_step(self, _optimizer: torch.optim.Optimizer, _arguments: Any, _keywords: Any) -> None:
        now = self._now() - self._started
        if self._profile is not None:
            self._profile.stop()
            self.measured |= profiled(self._profile.events())
            self._profile = None
        if len(self.seconds) == self.workload.steps:
            return
        self.seconds.append(now)
        if len(self.seconds) == self.workload.steps:
            if self._on_gpu:
                self.measured["allocatedBytes"] = torch.cuda.max_memory_allocated()
                self.measured["reservedBytes"] = torch.cuda.max_memory_reserved()
            activity = ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU
            self._profile = profile(activities=[activity])
            self._profile.start()

    def result(self, tokens: list[int]) -> dict[str, Any]:
        """Return the measurement with each step's useful `tokens`."""
        if self._profile is not None or not len(self.seconds) + 1 == len(tokens):
            raise AssertionError(f"{len(self.seconds)} steps measured and one profiled, tokens of {len(tokens)}")
        before = [0.0, *self.seconds]
        steps = [
            {"seconds": after - begun, "tokens": step_tokens}
            for begun, after, step_tokens in zip(before, self.seconds, tokens, strict=False)
        ]
        return {"steps": steps, **self.measured}


def profiled(events: Iterable[Any]) -> dict[str, Any]:
    """Return a step's kernels, and the seconds with work on the GPU; empty without a GPU's events."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    if not on_gpu:
        return {}
    kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
    ranges = [(event.time_range.start, event.time_range.end) for event in on_gpu]
    return {"kernels": len(kernels), "busySeconds": covered(ranges) / 1e6}


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Return the length of the ranges' union: kernels of several streams overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(ranges):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
