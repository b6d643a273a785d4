"""One GPU as the trainer takes it: it is accepted, and its allocator leaves no gaps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_trainer.core.sandbox import within_limits
from qlora_trainer.training.distributed.device import use_device
from tests.gpu.figures import Figures


def test_no_process_is_forked_from_one_that_sees_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="CUDA does not survive a fork"):
        within_limits(len, ("four",))


def test_this_gpu_is_accepted() -> None:
    assert use_device("cuda", 1, 0) == torch.device("cuda")
    assert torch.cuda.current_device() == 0


# Each tensor is a little larger than all before it, as micro batches are: no gap that one leaves fits the next.
GROWING = """
import sys
from pathlib import Path
from qlora_trainer.core.process import set_environment
set_environment("train", Path(sys.argv[1]), device="cuda")
import torch
for mebibytes in range(64, 512, 16):
    torch.empty(mebibytes * 2**20, dtype=torch.uint8, device="cuda")
print(torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated())
"""


def test_memory_of_growing_tensors_is_reused(tmp_path: Path, figures: Figures) -> None:
    command = [sys.executable, "-c", GROWING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    figures.add("memory reserved for growing tensors, of that allocated", float(done.stdout), "", limit=1.1)
    # With segments of fixed size it is more than ten times as much.
    assert float(done.stdout) <= 1.1
