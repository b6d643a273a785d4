"""Dequantizing experts takes no more memory than a dry run counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.experts.stack import ExpertStack, Mxfp4Stack
from qlora_trainer.model.memory.live_bytes import LiveBytes

SHAPE = (4, 512, 512)


def zeroed(stack: ExpertStack | Mxfp4Stack) -> ExpertStack | Mxfp4Stack:
    """Places that are in the tables."""
    for buffer in stack.buffers():
        buffer.zero_()
    return stack


def allocated(function: Callable[[], Tensor]) -> int:
    """The most bytes that PyTorch's allocator has given out at a time, and not had back, while it runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = function()
    assert kept.numel()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "stack",
    [
        Mxfp4Stack(SHAPE, "cpu"),
        ExpertStack(SHAPE, 2, QuantizationSpec(), "cpu"),
        ExpertStack(SHAPE, 2, QuantizationSpec(double_quant=False), "cpu"),
    ],
    ids=["mxfp4", "nf4", "nf4 of one level"],
)
def test_the_allocator_matches_the_count_of_a_dry_run(stack: ExpertStack | Mxfp4Stack) -> None:
    zeroed(stack)
    live = LiveBytes()
    with live:
        for buffer in stack.buffers():
            live.add(buffer)
        before = live.bytes
        live.take_peak()
        stack.dense(0, 4, torch.bfloat16)
    counted = live.take_peak() - before

    # Small tensors of bookkeeping are rounded up.
    assert allocated(lambda: stack.dense(0, 4, torch.bfloat16)) == pytest.approx(counted, rel=0.01)
