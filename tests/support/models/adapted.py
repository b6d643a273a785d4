"""A tiny base model with an adapter, and its results."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import Tensor

from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.file_names import ADAPTER_FILE
from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence
from qlora_trainer.model.adapter.attach import adapter_parameters, attach_adapter, restore_adapter
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from tests.support.models.sequences import CPU
from tests.support.resolved import resolved_lora

NF4 = QuantizationSpec()


def adapted(
    model: Path,
    *,
    dropout: float = 0.0,
    checkpointing: bool = True,
    seed: int = 3,
    **lora: Any,
) -> Any:
    """The model of a folder in 4-bit with an adapter."""
    spec = resolved_lora(rank=4, alpha=8, dropout=dropout, **lora)
    family = inspect_family(model, spec)
    return attach_adapter(
        load_base(model, NF4, "cpu", attention=family.attention),
        spec,
        family.target_modules,
        seed=seed,
        recomputation=Recomputation(None if checkpointing else 0),
        base_name="org/tiny",
        base_revision="0123abc",
    )


def restored(base: Path, adapter: Path, family: Family, *, checkpointing: bool = True) -> Any:
    """Load the 4-bit base with the adapter of a folder, as the train step does."""
    model = attach_adapter(
        load_base(base, NF4, "cpu", attention=family.attention),
        resolved_lora(rank=4, alpha=8),
        family.target_modules,
        seed=0,
        recomputation=Recomputation(None if checkpointing else 0),
        base_name="tiny",
        base_revision="0",
    )
    restore_adapter(model, load_file(adapter / ADAPTER_FILE))
    return model


def in_32_bit(model: Any) -> Any:
    """Convert the model to float32, so that no rounding changes a token's experts."""
    for module in model.float().modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model


def loss_and_gradients(model: Any, *rows: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Of the last row, behind the others in one sequence."""
    labels = torch.cat([*(torch.full_like(row, IGNORED_LABEL) for row in rows[:-1]), rows[-1]])
    batch = Batch.from_sequences([PackedSequence(torch.cat(rows), labels, tuple(map(len, rows)))], CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = batch_loss(model.get_base_model(), batch)
    return [loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values()))]
