"""The kernels of a step on a real card: expected ones, exact, and fast for new shapes."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_trainer.core import cpu
from qlora_trainer.model.experts.compute import _multiply, has_grouped_kernel
from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from qlora_trainer.model.kernels.norms import fuse_norms
from tests.gpu.figures import Figures
from tests.support.models.attention import MODULE

SHAPE = (8, 2048, 64)
GEOMETRIES = 100


def attend(lengths: tuple[int, ...], size: int = SHAPE[2]) -> tuple[Tensor, ...]:
    """Output and gradients of attention of rows, in bfloat16."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    shape = (1, SHAPE[0], sum(lengths), size)
    inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    rows = RowBoundaries.from_lengths(lengths, device)
    output, _ = rows_attention(MODULE, inputs[0], inputs[1], inputs[2], None, rows=rows)
    return output, *torch.autograd.grad(output.float().square().sum(), inputs)


def seconds(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def test_a_hundred_packings_need_few_kernels(figures: Figures) -> None:
    generator = torch.Generator().manual_seed(0)
    times, shapes = [], set()
    for _ in range(GEOMETRIES):
        lengths = tuple(torch.randint(20, 400, (9,), generator=generator).tolist())
        padding = cpu.padding(sum(lengths), "cuda")
        lengths = (*lengths, padding) if padding else lengths
        rows = RowBoundaries.from_lengths(lengths, torch.device("cpu"))
        shapes.add((sum(lengths), len(rows.offsets), rows.longest))
        times.append(seconds(partial(attend, lengths)))
    assert len(shapes) < GEOMETRIES / 2
    figures.add("attention of the first packing", times[0], "s")
    figures.add(f"attention of packing {GEOMETRIES}", times[-1], "s")


@pytest.mark.parametrize("size", [64, 100, 128])
def test_empty_rows_and_padded_heads_leave_numbers_finite_and_equal_to_the_cpus(size: int) -> None:
    lengths = (7, 130, 1, 64, 54)
    found = attend(lengths, size)
    torch.manual_seed(0)
    shape = (1, SHAPE[0], sum(lengths), size)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).cpu().float().requires_grad_() for _ in range(3)]
    rows = RowBoundaries.from_lengths(lengths, torch.device("cpu"))
    output, _ = rows_attention(MODULE, inputs[0], inputs[1], inputs[2], None, rows=rows)
    expected = (output, *torch.autograd.grad(output.square().sum(), inputs))
    for one, other in zip(found, expected, strict=True):
        assert bool(one.isfinite().all())
        assert float((one.cpu().float() - other).norm() / other.norm()) < 2e-2


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_multiplied_together_are_those_multiplied_apart(transposed: bool) -> None:
    device, counts = torch.device("cuda"), (0, 17, 3, 0, 130, 1, 0)
    if not has_grouped_kernel(device):
        pytest.skip("needs a GPU of compute capability 9 or 10 with 64 GiB")
    torch.manual_seed(0)
    weights = torch.randn(len(counts), 96, 64, device=device, dtype=torch.bfloat16)
    rows = torch.randn(sum(counts), 96 if transposed else 64, device=device, dtype=torch.bfloat16)
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    found = _multiply(rows, weights, ends, transposed=transposed)
    expected = _multiply(rows.float(), weights.float(), counts, transposed=transposed)
    assert float((found.float() - expected).norm() / expected.norm()) < 2**-7


@pytest.mark.parametrize("name", ["llama.LlamaRMSNorm", "gemma2.Gemma2RMSNorm"])
def test_norms_and_their_gradients_are_those_of_transformers(name: str) -> None:
    import importlib

    family, kind = name.split(".")
    norm: Any = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), kind)(256)
    norm = norm.to("cuda", torch.bfloat16).requires_grad_(False)
    norm.weight += 0.2 * torch.randn_like(norm.weight)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    results = []
    for fuse in (False, True):
        if fuse:
            fuse_norms(torch.nn.Sequential(norm))
            assert type(norm).__name__.startswith("Fused")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = norm(x)
        assert output.dtype == torch.bfloat16
        results.append((output, torch.autograd.grad(output.float().square().sum(), x)[0]))
    for found, expected in zip(results[1], results[0], strict=True):
        assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 2**-6
