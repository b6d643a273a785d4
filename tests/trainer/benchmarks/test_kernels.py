"""A change of the trainer that costs a GPU more work fails: the work of a block is counted, without a GPU."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from benchmarks.kernels import CASES, NAME, Case, Launches, count
from benchmarks.machine import RESULTS
from qlora_trainer.model.memory.device import fake_cuda

CEILINGS = json.loads((RESULTS / f"{NAME}.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.block)
def test_a_block_is_the_gpu_work_that_is_written_down(case: Case) -> None:
    found = asdict(count(case))
    assert found == CEILINGS[case.block], "if the change is worth it, `make kernels` writes the new figures"


def test_only_operations_that_write_on_the_gpu_are_counted_and_each_wait() -> None:
    with fake_cuda():
        matrix, layer = torch.empty(8, 4, device="cuda"), nn.Linear(4, 2, bias=False, device="cuda")
        with torch.no_grad(), Launches() as launches:
            # Nothing on the GPU: views, an allocation, an operation of the CPU.
            torch.empty_like(matrix.view(4, 8).mT[1:])
            torch.ones(2)
            assert (launches.operations, launches.moved_bytes) == (0, 0)
            # Each reads and writes all 32 numbers; the last reads 32 and 8 and writes 16.
            (matrix + 1).mul_(2)
            layer(matrix)
            assert launches.moved_bytes == 4 * (2 * (32 + 32) + 32 + 8 + 16)
            matrix.cpu()
            matrix.to("cpu", non_blocking=True)
    assert (launches.operations, launches.matmuls, launches.waits) == (5, 1, 1)
