"""Puts the model back, for a comparison, to what it computed before the first optimizer step."""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_trainer.model.adapter.attach import activate_adapter, adapter_tensors, restore_adapter
from qlora_trainer.model.adapter.initial import read_initial_adapter
from qlora_trainer.training.state import Run


@contextmanager
def as_at_start(run: Run) -> Iterator[None]:
    """In the body the model computes as at step 0: as the base alone, or with the adapter of spec.lora.from.

    The trained adapter waits in main memory, and is put back to the last bit. Raises StepFailure (UNSAFE_ARTIFACT) if
    somebody has changed the earlier adapter in the workspace.
    """
    if run.initial_adapter_sha256 is None:
        try:
            with run.model.disable_adapter():
                yield
        finally:
            # PEFT gives gradients back to the active adapter only.
            activate_adapter(run.adapted_base, run.adapter)
        return
    initial = read_initial_adapter(run.context.workspace.initial_adapter, run.initial_adapter_sha256)
    trained = {name: tensor.clone() for name, tensor in adapter_tensors(run.model).items()}
    restore_adapter(run.model, initial)
    try:
        yield
    finally:
        restore_adapter(run.model, trained)


def named_start(run: Run) -> str:
    """What that is, for messages."""
    if run.initial_adapter_sha256 is None:
        return "the base model without the adapter"
    return "the adapter of spec.lora.from"
