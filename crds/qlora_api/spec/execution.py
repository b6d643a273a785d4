"""The part of a QLoRAJob's spec about its volume, its nodes and its retries."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import (
    DNS_LABEL,
    DNS_SUBDOMAIN,
    AccessMode,
    NodeSelector,
    ObjectName,
    Quantity,
    Tolerations,
)
from qlora_api.retention import ClaimRetentionPolicy
from qlora_api.schema import ApiModel, rule, rules

DEFAULT_PROFILE = "default"
# A label of the Job has it.
QueueName = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_SUBDOMAIN)]
_POLICY_OF_OWN_CLAIM = (
    "persistentVolumeClaimRetentionPolicy is for a claim that the operator creates: remove it, or claimName"
)
_PRIORITY_MESSAGE = "priorityClassName: classes that begin with system- are reserved for the cluster; name another"


class WorkspaceSpec(ApiModel):
    """The volume that the steps share: an existing claim, or how to create one."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.claimName) || !(has(self.size) || has(self.storageClassName) || has(self.accessModes))",
                "set either claimName, or size, storageClassName and accessModes",
            ),
            rule("!has(self.claimName) || !has(self.persistentVolumeClaimRetentionPolicy)", _POLICY_OF_OWN_CLAIM),
            rule(
                "!has(self.accessModes) || self.accessModes.size() == 1 || "
                "!self.accessModes.exists(mode, mode == 'ReadWriteOncePod')",
                "accessModes: ReadWriteOncePod cannot be combined with another",
            ),
        )
    )

    claim_name: ObjectName | None = Field(
        default=None,
        description="An existing PersistentVolumeClaim of this namespace. The job uses a separate folder in it.",
    )
    size: Quantity | None = Field(
        default=None, description="Size of the claim to create, for example 100Gi; the profile's if not set."
    )
    storage_class_name: ObjectName | None = Field(default=None, description="StorageClass; the profile's if not set.")
    access_modes: Annotated[tuple[AccessMode, ...], Field(min_length=1, max_length=3)] | None = Field(
        default=None, description="Access modes; the profile's if not set."
    )
    persistent_volume_claim_retention_policy: ClaimRetentionPolicy | None = Field(
        default=None,
        description="When the claim to create is deleted; what is not set is the profile's, or Retain.",
    )

    @property
    def deletes_claim(self) -> bool:
        """Whether the policy of the job deletes the claim at some time."""
        policy = self.persistent_volume_claim_retention_policy
        return policy is not None and "Delete" in (policy.when_deleted, policy.when_finished)

    @model_validator(mode="after")
    def _either_or(self) -> Self:
        if self.claim_name is not None and (self.size or self.storage_class_name or self.access_modes):
            raise ValueError("set either claimName, or size, storageClassName and accessModes")
        if self.claim_name is not None and self.persistent_volume_claim_retention_policy is not None:
            raise ValueError(_POLICY_OF_OWN_CLAIM)
        if self.access_modes is not None and len(self.access_modes) > 1 and "ReadWriteOncePod" in self.access_modes:
            raise ValueError("accessModes: ReadWriteOncePod cannot be combined with another")
        return self


class SchedulingSpec(ApiModel):
    """Where the pods run, within what the profile allows."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.priorityClassName) || !self.priorityClassName.startsWith('system-')", _PRIORITY_MESSAGE)
        )
    )

    profile_name: str = Field(
        default=DEFAULT_PROFILE,
        min_length=1,
        max_length=63,
        pattern=DNS_LABEL,
        description="The QLoRAProfile: image, nodes, limits.",
    )
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods.")
    node_selector: NodeSelector | None = Field(default=None, description="Additional labels that the nodes must have.")
    tolerations: Tolerations | None = Field(default=None, description="Additional taints that the pods tolerate.")
    queue_name: QueueName | None = Field(
        default=None,
        description="LocalQueue of Kueue where train waits for its GPUs; that of the QLoRAJob's label "
        "kueue.x-k8s.io/queue-name if not set, else none. Prepare and publish need no GPU and do not wait.",
    )
    queue_priority_class_name: QueueName | None = Field(
        default=None,
        description="WorkloadPriorityClass of Kueue; that of the QLoRAJob's label kueue.x-k8s.io/priority-class if not "
        "set.",
    )

    @model_validator(mode="after")
    def _not_a_system_class(self) -> Self:
        if self.priority_class_name is not None and self.priority_class_name.startswith("system-"):
            raise ValueError(_PRIORITY_MESSAGE)
        return self


class RetrySpec(ApiModel):
    """Limits of retries after failures and of resumptions after interruptions."""

    max_failures: int = Field(
        default=3, ge=0, le=20, description="Maximal retries of a failed step, with exponential backoff."
    )
    max_disruptions: int = Field(
        default=20,
        ge=0,
        le=1000,
        description="Maximal resumptions after the pod was evicted, preempted or deleted. Suspensions, also by a "
        "queue, do not count.",
    )
    on_no_progress: Literal["report", "restart"] | None = Field(
        default=None,
        description="Treatment of a step without progress for progressDeadlineSeconds: report it in the "
        "condition Progressing, or also restart it from its checkpoint, which counts as a failure; report if not set.",
    )
    request: str | None = Field(
        default=None,
        min_length=1,
        max_length=63,
        description="Any text that differs from the last one, such as the time, retries a failed job: at the step that "
        "failed, from the last checkpoint, with fresh counts and the profile and the mutable fields as they are then. "
        "It also takes today's profile for a step whose pod could not start, for example for a wrong image. Without "
        "effect on any other job.",
    )
