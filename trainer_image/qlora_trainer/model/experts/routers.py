"""Keeps the routers of a mixture of experts out of autocast, which would round their 32-bit results.

Many multiply in float32 (`linear(x.float(), weight.float())`), because a token goes to other experts for a small
difference of scores. Autocast casts both back to 16 bit: in training, tokens would go to other experts than in use.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlora_trainer.model.experts.compute import expert_modules


def route_without_autocast(model: nn.Module) -> None:
    """Make every router compute as without autocast. Keeps parameters and names."""
    for router in routers(model):
        router.__class__ = type(f"Exact{type(router).__name__}", (_WithoutAutocast, type(router)), {})


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers: modules next to routed experts with a matrix of one row for each expert.

    Layers in 4-bit are none, whatever their sizes.
    """
    return [router for name, experts in expert_modules(model) for router in _routers_of(model, name, experts)]


def experts_without_router(model: nn.Module) -> str | None:
    """The name of the first experts without a router next to them, or None."""
    return next((name for name, experts in expert_modules(model) if not _routers_of(model, name, experts)), None)


def _routers_of(model: nn.Module, name: str, experts: Any) -> list[nn.Module]:
    siblings = (child for child in model.get_submodule(name.rpartition(".")[0]).children() if child is not experts)
    return [child for child in siblings if _routes(child, experts.num_experts)]


def _routes(module: nn.Module, experts: int) -> bool:
    """Whether it has a score for each expert, or also for none of them (Zaya)."""
    return any(
        parameter.ndim == 2 and parameter.shape[0] in (experts, experts + 1) and parameter.is_floating_point()
        for parameter in module.parameters()
    )


class _WithoutAutocast(nn.Module):
    """A module of transformers, given what it would be given without autocast."""

    def forward(self, hidden_states: Tensor, *arguments: object, **named: object) -> object:
        """The module's own result."""
        dtype = next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())
        if dtype.itemsize < hidden_states.dtype.itemsize:
            hidden_states = hidden_states.to(dtype)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states, *arguments, **named)
