"""A tiny base model with an adapter."""

from pathlib import Path
from typing import Any

from qlora_api.training import LoraSpec, QuantizationSpec
from qlora_trainer.model.adapter import attach_adapter
from qlora_trainer.model.base import load_base
from qlora_trainer.model.base_weights import BaseWeights
from qlora_trainer.model.support import inspect_family

NF4 = QuantizationSpec()


def adapted(
    model: Path,
    *,
    dropout: float = 0.0,
    checkpointing: bool = True,
    original: BaseWeights | None = None,
    **lora: Any,
) -> Any:
    """The model of a folder in 4-bit with an adapter."""
    spec = LoraSpec(rank=4, alpha=8, dropout=dropout, **lora)
    family = inspect_family(model, spec)
    return attach_adapter(
        load_base(model, NF4, "cpu", attention=family.attention),
        spec,
        family.target_modules,
        seed=3,
        gradient_checkpointing=checkpointing,
        base_name="org/tiny",
        base_revision="0123abc",
        original=original,
    )
