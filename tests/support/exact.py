"""Float32 and random words, for results of two ways of computing that are compared."""

from random import Random

import pytest
import torch

from qlora_trainer.core import cpu
from qlora_trainer.model.base import chosen_layers, layout, load
from qlora_trainer.model.kernels.fused_lora import FusedLora
from qlora_trainer.model.nf4 import quantization

_WORDS = ("list", "the", "pods", "of", "every", "node", "and", "scale", "my", "shop", "to", "three", "replicas", "now")


def random_words(random: Random, most: int) -> str:
    """Up to so many words."""
    return " ".join(random.choices(_WORDS, k=random.randint(1, most)))


def compute_in_float32(monkeypatch: pytest.MonkeyPatch, *, fused: bool = True) -> None:
    """Let the trainer compute in float32, and the loss in several chunks although the data are small.

    With each LoRA layer: the fused one, or PEFT's, for dropout and DoRA. The base is not rounded to 16 bit, which the
    reference does not do.
    """
    for module in (load, chosen_layers, quantization):
        monkeypatch.setattr(module, "BASE_DTYPE", torch.float32)
    monkeypatch.setattr(layout.BaseLayout, "_dtype", lambda _layout, _name: "F32")
    if not fused:
        monkeypatch.setattr(FusedLora, "_is_plain", lambda _layer, _x: False)
    monkeypatch.setattr(cpu, "loss_chunk_tokens", lambda _device_type: 16)
