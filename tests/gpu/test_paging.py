"""Paged optimizer state on a GPU: it is paged, stays paged after a resume, and resumes exactly."""

import pytest
import torch
from torch import nn

from qlora_trainer.training.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from tests.support.resolved import resolved_training

PAGED = ["paged_adamw_32bit", "paged_adamw_8bit"]
# bitsandbytes pages tensors of at least 100,000 entries.
LARGE, SMALL = (400, 400), (64, 64)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, device="cuda")) for name, shape in (("a", LARGE), ("b", SMALL))}


def steps(trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator("cuda").manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
        optimizer.step()
    torch.cuda.synchronize()


def is_paged(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[bool]:
    moments = (value for name, value in optimizer.state[parameter].items() if name in ("state1", "state2"))
    return [bool(getattr(value, "is_paged", False)) for value in moments]


@pytest.mark.parametrize("name", PAGED)
def test_it_is_paged_before_and_after_an_exact_resume(name: str) -> None:
    training = resolved_training(optimizer=name, learning_rate=0.01)
    whole = parameters()
    undisturbed = make_optimizer(whole.values(), training)
    steps(whole, undisturbed, 0, 4)

    first = parameters()
    before = make_optimizer(first.values(), training)
    steps(first, before, 0, 2)
    assert is_paged(before, first["a"]) == [True, True]
    saved = optimizer_tensors(before, first)
    assert all(tensor.device.type == "cpu" for tensor in saved.values())

    second = parameters()
    for key, parameter in second.items():
        parameter.data.copy_(first[key].data)
    after = make_optimizer(second.values(), training)
    restore_optimizer(after, second, saved)
    assert is_paged(after, second["a"]) == [True, True]
    steps(second, after, 2, 4)
    for key, parameter in whole.items():
        assert torch.equal(parameter, second[key]), key


def test_paged_state_can_leave_the_gpu() -> None:
    """With the GPU nearly full, a step still runs: the driver moves state out."""
    training = resolved_training(optimizer="paged_adamw_32bit")
    side = 16_384
    weight = nn.Parameter(torch.zeros(side, side, device="cuda"))  # 1 GiB, and as much gradient; 2 GiB of state
    weight.grad = torch.ones_like(weight)
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 2**30), dtype=torch.uint8, device="cuda")
    optimizer = make_optimizer([weight], training)
    optimizer.step()
    torch.cuda.synchronize()
    assert bool((weight != 0).all())
    del ballast
