"""Steps start without PyTorch's compiler, which bitsandbytes still gets where it needs it."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.compile_later import compile_later
from tests.support.commands.command import Files


@pytest.mark.parametrize("step", ["prepare", "train", "publish"])
def test_no_step_loads_the_compiler(step: str, finished: Files) -> None:
    log = (WorkspaceLayout(finished.workspace).records / f"{step}.log").read_text()
    loaded = {line.rpartition("|")[2].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert "bitsandbytes.functional" in loaded
    assert "torch._inductor.compile_fx" not in loaded


@pytest.mark.parametrize("as_decorator", [False, True])
def test_a_function_is_compiled_once_when_it_is_first_called(as_decorator: bool) -> None:
    def double(tensor: torch.Tensor) -> torch.Tensor:
        """Twice the tensor."""
        return tensor + tensor

    torch._dynamo.reset()
    graphs = counters["stats"]
    before = graphs["unique_graphs"]
    decorate = partial(compile_later, partial(torch.compile, backend="eager"))
    late = decorate(dynamic=False)(double) if as_decorator else decorate(double)
    assert (late.__doc__, graphs["unique_graphs"]) == ("Twice the tensor.", before)
    for _ in range(2):
        assert late(torch.ones(2)).tolist() == [2.0, 2.0]
        assert graphs["unique_graphs"] == before + 1
