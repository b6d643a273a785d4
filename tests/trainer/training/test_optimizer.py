"""The paged optimizers update as bitsandbytes does, and wait for the GPU once in a step."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from torch import Tensor, nn

from qlora_trainer.training import optimizer as module
from qlora_trainer.training.optimizer import (
    BETAS,
    EPSILON,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from tests.support.resolved import resolved_training

SHAPES = {"small": (3, 5), "whole blocks": (64, 128), "ragged": (77, 131), "row": (4096,)}
ORIGINALS = {
    "paged_adamw_32bit": bitsandbytes.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}
RATES = (1e-2, 1e-2, 3e-3, 5e-2)
SKIPPED = {1: ("row",), 2: ("small", "ragged")}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def give_gradients(trained: dict[str, nn.Parameter], step: int) -> None:
    """The gradients of a step, in which some parameters have none."""
    generator = torch.Generator().manual_seed(100 + step)
    for name, parameter in trained.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in SKIPPED.get(step, ()) else gradient


def states(optimizer: torch.optim.Optimizer, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {**trained, **optimizer_tensors(optimizer, trained)}


@pytest.mark.parametrize("name", ORIGINALS)
def test_steps_are_those_of_bitsandbytes_also_after_a_resume(name: str) -> None:
    training = resolved_training(optimizer=name, weight_decay=0.01)
    expected, trained = parameters(), parameters()
    original = ORIGINALS[name](expected.values(), lr=1e-2, betas=BETAS, eps=EPSILON, weight_decay=0.01)
    optimizer = make_optimizer(trained.values(), training)
    for step, rate in enumerate(RATES):
        if step == 2:
            saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, trained).items()}
            optimizer = make_optimizer(trained.values(), training)
            restore_optimizer(optimizer, trained, saved)
        for each, of_run in ((original, expected), (optimizer, trained)):
            give_gradients(of_run, step)
            set_learning_rate(each, rate)
            each.step()
    for key, value in states(original, expected).items():
        assert torch.equal(value, states(optimizer, trained)[key]), key


@pytest.mark.parametrize("name", ORIGINALS)
def test_paged_state_is_fetched_before_its_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the GPU would fetch each of its pages when the update comes to it."""
    trained, order = parameters(), list[str]()
    optimizer = make_optimizer(trained.values(), resolved_training(optimizer=name))
    give_gradients(trained, 0)
    optimizer.step()
    for key, parameter in trained.items():
        for moment in ("state1", "state2"):
            # As bitsandbytes marks what it pages, which a CPU cannot.
            state = optimizer.state[parameter][moment]
            state.is_paged, state.place = True, f"{moment} of {key}"
    update = optimizer.update_step

    def noted_update(group: Any, parameter: nn.Parameter, number: int, index: int) -> None:
        order.append(list(trained)[index])
        update(group, parameter, number, index)

    monkeypatch.setattr("bitsandbytes.functional.prefetch_tensor", lambda state: order.append(state.place))
    monkeypatch.setattr(optimizer, "update_step", noted_update)

    give_gradients(trained, 2)
    optimizer.step()

    assert order == [
        *("state1 of whole blocks", "state2 of whole blocks", "whole blocks"),
        *("state1 of row", "state2 of row", "row"),
    ]


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_step_waits_for_the_gpu_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Sequence[int]] = []
    monkeypatch.setattr(module, "sync_gpu", lambda tensor: waits.append(tensor.shape))
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda tensor: waits.append(tensor.shape))
    trained = parameters()
    optimizer = make_optimizer(trained.values(), resolved_training(optimizer=name))
    for step in range(len(RATES)):
        give_gradients(trained, step)
        optimizer.step()
    assert len(waits) == len(RATES)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert len(waits) == len(RATES)
