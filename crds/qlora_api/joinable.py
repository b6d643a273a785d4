"""Decides by their settings whether jobs can train together on one base.

They share one process. All functions are pure. The train step compares the contents of their workspaces, such as the
bytes of the base.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_api.schema import rule
from qlora_api.spec.job import QLoRAJobSpec

MAX_TOGETHER = 16
"""Jobs that one process trains."""
SAME_BASE = "give both the same model, revision and quantization"


class _Alone(NamedTuple):
    """A field of jobs that are trained alone only."""

    field: str
    absent: str
    """CEL, on the spec: that it is not set."""
    is_set: Callable[[QLoRAJobSpec], bool]


_ALONE = (
    _Alone(
        "resources.gpus",
        "self.resources.gpus == 1 && (!has(self.resources.nodes) || self.resources.nodes == 1)",
        lambda spec: spec.resources.gpu_count > 1,
    ),
    _Alone("lora.dropout", "self.lora.dropout == 0.0", lambda spec: spec.lora.dropout > 0),
    _Alone("lora.useDora", "!self.lora.useDora", lambda spec: spec.lora.use_dora),
    _Alone("lora.modulesToSave", "!has(self.lora.modulesToSave)", lambda spec: spec.lora.modules_to_save is not None),
    _Alone(
        "training.autoMicroBatch",
        "!has(self.training.autoMicroBatch) || !self.training.autoMicroBatch",
        lambda spec: bool(spec.training.auto_micro_batch),
    ),
    _Alone(
        "training.objective",
        "!has(self.training.objective) || self.training.objective == 'supervised'",
        lambda spec: spec.training.compares_answers,
    ),
    _Alone("budget", "!has(self.budget)", lambda spec: spec.budget is not None),
)


def rules_of_template(spec: str, alone: str, setting: str) -> list[dict[str, Any]]:
    """Return the rules that let all jobs with this template train together.

    `not_together` checks them too. `spec`: where the template is. `alone`: CEL, that its jobs are trained alone.
    `setting`: the setting that trains them together.
    """
    absent = ((each.absent.replace("self.", f"{spec}."), each.field) for each in _ALONE)
    return [rule(f"{alone} || ({condition})", _not_supported(field, setting)) for condition, field in absent]


def not_together(spec: QLoRAJobSpec, setting: str) -> str:
    """Return why jobs with this template cannot train together, empty if they can."""
    field = _field_alone(spec)
    return _not_supported(field, setting) if field else ""


def not_joinable(name: str, reason: str) -> str:
    """The sentence for a job that cannot be trained together with others."""
    return f"{name} cannot be trained together with other jobs: {reason}"


def setting_alone(spec: QLoRAJobSpec) -> str:
    """Return the setting that only a job trained alone can have, empty for none."""
    field = _field_alone(spec)
    if not field:
        return ""
    return f"spec.{field} is not supported when jobs are trained together: remove it, or train the job alone"


def rows_not_apart(model_type: str) -> str:
    """The reason for a model that needs a sequence for each row."""
    return f"models of type {model_type} cannot keep the rows of several jobs apart: train it alone"


def different_pass(spec: QLoRAJobSpec, first: QLoRAJobSpec, name: str) -> str:
    """Return the setting of a pass that differs from the first job's, empty for none."""
    # Automatic is on where jobs are trained together.
    if (spec.training.gradient_checkpointing is False) != (first.training.gradient_checkpointing is False):
        return f"spec.training.gradientCheckpointing differs from that of {name}: give both the same"
    return ""


def _field_alone(spec: QLoRAJobSpec) -> str:
    """Return the field, without `spec.`, of a job trained alone only, empty for none."""
    return next((each.field for each in _ALONE if each.is_set(spec)), "")


def _not_supported(field: str, setting: str) -> str:
    named = "resources.gpus or nodes above 1" if field == "resources.gpus" else field
    return f"{named} is not supported with {setting}, which trains several jobs in one process: remove one of them"
