"""Which jobs are trained together, in one pod on one base: `spec.group`, what it excludes, and `status.group`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from qlora_api.profile import DNS_LABEL
from qlora_api.schema import ApiModel, ObservedModel, rule

if TYPE_CHECKING:
    from qlora_api.spec.job import QLoRAJobSpec

MAX_GROUP_SIZE = 16


class GroupSpec(ApiModel):
    """The jobs of this namespace with the same name here are trained together, in one pod, on one base."""

    name: str = Field(
        min_length=1, max_length=63, pattern=DNS_LABEL, description="Name of the group, the same in all of its jobs."
    )
    size: int = Field(
        ge=2,
        le=MAX_GROUP_SIZE,
        description="How many jobs are trained together: each waits, prepared, until so many are.",
    )


class GroupMemberStatus(ObservedModel):
    """A job of a group."""

    name: str = Field(max_length=256, description="Its name.")
    uid: str = Field(max_length=64, description="Its UID.")


class GroupStatus(ObservedModel):
    """With which jobs this one is trained, from when the group of spec.group was complete."""

    leader: str = Field(max_length=256, description="The job whose train pod trains all of them.")
    leader_uid: str = Field(max_length=64, description="UID of that job.")
    members: tuple[GroupMemberStatus, ...] | None = Field(
        None,
        max_length=MAX_GROUP_SIZE,
        description="In the status of the leader: the jobs of the complete group, the leader among them. Once "
        "the leader is retried, it alone.",
    )


class _Alone(NamedTuple):
    """A field with which a job is trained alone only."""

    field: str
    absent: str
    """CEL, on the spec: that it is not set."""
    is_set: Callable[["QLoRAJobSpec"], bool]


_ALONE = (
    _Alone(
        "resources.gpus",
        "self.resources.gpus == 1 && (!has(self.resources.nodes) || self.resources.nodes == 1)",
        lambda spec: spec.resources.gpu_count > 1,
    ),
    _Alone("lora.dropout", "self.lora.dropout == 0.0", lambda spec: spec.lora.dropout > 0),
    _Alone("lora.useDora", "!self.lora.useDora", lambda spec: spec.lora.use_dora),
    _Alone("lora.modulesToSave", "!has(self.lora.modulesToSave)", lambda spec: spec.lora.modules_to_save is not None),
    _Alone("training.autoMicroBatch", "!self.training.autoMicroBatch", lambda spec: spec.training.auto_micro_batch),
    _Alone(
        "training.objective",
        "!has(self.training.objective) || self.training.objective == 'supervised'",
        lambda spec: spec.training.compares_answers,
    ),
    _Alone("budget", "!has(self.budget)", lambda spec: spec.budget is not None),
)
_OWN_CLAIM = (
    "group trains several jobs in one pod, which mounts one claim: set workspace.claimName to the same claim in all of "
    "its jobs"
)


def trained_alone(spec: "QLoRAJobSpec") -> str:
    """The field, without `spec.`, with which a job cannot be trained together with others; empty for none."""
    return next((each.field for each in _ALONE if each.is_set(spec)), "")


def group_rules() -> list[dict[str, Any]]:
    """The rules of a spec with a group, which `reject_ungroupable` knows too."""
    return [
        *(rule(f"!has(self.group) || ({each.absent})", _not_supported(each.field, "group")) for each in _ALONE),
        rule("!has(self.group) || has(self.workspace.claimName)", _OWN_CLAIM),
    ]


def rules_of_template(spec: str, alone: str, setting: str) -> list[dict[str, Any]]:
    """The rules by which all jobs with this template can be trained together, which `not_together` knows too.

    `spec`: where the template is. `alone`: CEL, that its jobs are not to be grouped. `setting`: what groups them.
    """
    absent = ((each.absent.replace("self.", f"{spec}."), each.field) for each in _ALONE)
    return [rule(f"{alone} || ({condition})", _not_supported(field, setting)) for condition, field in absent]


def not_together(spec: "QLoRAJobSpec", setting: str) -> str:
    """Why jobs with this template cannot be trained together; empty if they can."""
    field = trained_alone(spec)
    return _not_supported(field, setting) if field else ""


def reject_ungroupable(spec: "QLoRAJobSpec") -> None:
    """Raise ValueError if the job names a group and cannot be in one."""
    if spec.group is None:
        return
    if field := trained_alone(spec):
        raise ValueError(_not_supported(field, "group"))
    if spec.workspace.claim_name is None:
        raise ValueError(_OWN_CLAIM)


def _not_supported(field: str, setting: str) -> str:
    named = "resources.gpus or nodes above 1" if field == "resources.gpus" else field
    return f"{named} is not supported with {setting}, which trains several jobs in one process: remove one of them"
