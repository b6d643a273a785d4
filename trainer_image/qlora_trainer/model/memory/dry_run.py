"""Measures a job's memory by a dry run in the sandbox. Loads no torch itself."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_api.memory.estimate import ActivationBytes
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.compile_later import load_bitsandbytes
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.core.sandbox import DryRunFailed, within_limits
from qlora_trainer.model.source.hub_config import INSTALL

# By its name: importers of this module do not load torch.
_MEASURE = "qlora_trainer.model.memory.measure"


@dataclass(frozen=True)
class StepSize:
    """A micro batch to measure."""

    sequences: int
    sequence_tokens: int
    gradient_checkpointing: bool


def measure_within_limits(
    config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str, family: object = None
) -> MeasuredMemory:
    """Run `measure.measure` in at most ten minutes and 2 GiB. `family`: as there.

    Raises StepFailure for a model that cannot be trained, RuntimeError in a process that sees a GPU, and DryRunFailed
    for whatever else there is.
    """
    _require_trainer()
    return within_limits(_call, (config, spec, tuple(sizes), digest, family))


def measure_together_within_limits(
    config: Path, specs: Sequence[ResolvedSpec], passes: Sequence[tuple[int, ...]], family: object = None
) -> tuple[ActivationBytes, ...]:
    """Run `measure.measure_together` with the limits of `measure_within_limits`."""
    _require_trainer()
    return within_limits(_call_together, (config, tuple(specs), tuple(passes), family))


def _require_trainer() -> None:
    if importlib.util.find_spec("torch") is None:
        raise DryRunFailed(f"the trainer is not installed: {INSTALL}")


def _call(*arguments: object) -> MeasuredMemory:
    load_bitsandbytes()
    return importlib.import_module(_MEASURE).measure(*arguments)


def _call_together(*arguments: object) -> tuple[ActivationBytes, ...]:
    load_bitsandbytes()
    return importlib.import_module(_MEASURE).measure_together(*arguments)
