"""Decides by their manifests whether jobs can be trained together, on one base in one process; pure.

The train step compares the contents of their workspaces, such as the bytes of the base.
"""

from collections.abc import Sequence

from qlora_api.spec.group import trained_alone
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec

_ALONE = "remove it, or train the job alone"


def not_joinable(name: str, reason: str) -> str:
    """The sentence for a job that cannot be trained together with others."""
    return f"{name} cannot be trained together with other jobs: {reason}"


def unjoinable(documents: Sequence[QLoRAJobDocument]) -> str | None:
    """The sentence for the first job that its manifest keeps from being trained together with the others, if any."""
    first = documents[0]
    for document in documents:
        name, spec = first.metadata.name, document.spec
        reason = (
            setting_alone(spec)
            or _different_group(spec, first.spec, name)
            or _different_base(spec, first.spec, name)
            or different_pass(spec, first.spec, name)
        )
        if reason:
            return not_joinable(document.metadata.name, reason)
    return None


def setting_alone(spec: QLoRAJobSpec) -> str:
    """Which setting is for a job that is trained alone; empty for none."""
    field = trained_alone(spec)
    return f"spec.{field} is not supported when jobs are trained together: {_ALONE}" if field else ""


def rows_not_apart(model_type: str) -> str:
    """The reason for a model that needs a sequence for each row."""
    return f"models of type {model_type} cannot keep the rows of several jobs apart: train it alone"


def _different_group(spec: QLoRAJobSpec, first: QLoRAJobSpec, name: str) -> str:
    """That the job is of another group than the first, whose `name` is given; empty if one of them is of none."""
    if spec.group is None or first.group is None or spec.group == first.group:
        return ""
    return f"spec.group differs from that of {name}: give both the same name and size"


def _different_base(spec: QLoRAJobSpec, first: QLoRAJobSpec, name: str) -> str:
    """Which setting of the base differs from that of the first job, whose `name` is given; empty for none."""
    shared = {
        "spec.model.source": (spec.model.source, first.model.source),
        "spec.model.revision": (spec.model.revision or "main", first.model.revision or "main"),
        "spec.quantization": (spec.quantization, first.quantization),
    }
    for field, (own, other) in shared.items():
        if own != other:
            return f"{field} differs from that of {name}: {SAME_BASE}"
    return ""


SAME_BASE = "give both the same model, revision and quantization"


def different_pass(spec: QLoRAJobSpec, first: QLoRAJobSpec, name: str) -> str:
    """Which setting of a pass through the model differs from that of the first job; empty for none."""
    if spec.training.gradient_checkpointing != first.training.gradient_checkpointing:
        return f"spec.training.gradientCheckpointing differs from that of {name}: give both the same"
    return ""
