"""Replaces activation functions made of many operations by PyTorch's single one."""

import torch
from torch import nn
from torch.nn.functional import gelu
from transformers import activations

# In float32, two correct ways to compute the same differ by a few roundings of 2^-24.
_TOLERANCE = 2.0**-20


def fuse_activations(model: nn.Module) -> None:
    """Replace every module that computes GELU by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415).

    Phi's takes eight operations, whose results are kept for backward. One of them is a power: autocast on a GPU
    computes that in float32, and returns it to the layer behind.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if _is_composed_gelu(child):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _is_composed_gelu(module: nn.Module) -> bool:
    if type(module).__module__ != activations.__name__ or next(module.parameters(), None) is not None:
        return False
    x = torch.linspace(-8, 8, 257, device="cpu")
    return torch.allclose(module(x), gelu(x, approximate="tanh"), rtol=_TOLERANCE, atol=_TOLERANCE)
