"""The type that a model's matmuls are computed in, and the context that computes in it.

In 16 bit by autocast, as parameters of the adapter are in 32 bit. In 32 bit, for CPUs without bfloat16, all parameters
outside the 4-bit layers are, and nothing is cast.
"""

import torch
from bitsandbytes.nn import Linear4bit

from qlora_trainer.core.cpu import ComputeType
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.model.protocols import Network

COMPUTE_DTYPES: dict[ComputeType, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def compute_dtype(model: Network) -> torch.dtype:
    """Return the type of the model's matmuls: that of its 4-bit layers, if it has any."""
    layers = (module for module in model.modules() if isinstance(module, Linear4bit))
    return next((layer.compute_dtype for layer in layers), BASE_DTYPE)


def computing(model: Network, device: str, *, cache: bool = False, dtype: torch.dtype | None = None) -> torch.autocast:
    """Return a context that computes the model's matmuls in its type, or in `dtype`.

    `cache`: whether to keep 16-bit copies of the adapter until its end, 1.6 GB at 65B and rank 64.
    """
    is_cast = (dtype or compute_dtype(model)) == BASE_DTYPE
    return torch.autocast(device, dtype=BASE_DTYPE, enabled=is_cast, cache_enabled=cache)
