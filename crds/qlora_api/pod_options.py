"""The options of a profile's pods: where they are scheduled, with which labels, devices and claims."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import (
    DNS_LABEL,
    LABEL_KEY,
    LabelKey,
    LabelValue,
    NodeSelector,
    ObjectName,
    Tolerations,
)
from qlora_api.schema import ApiModel, rule, rules

_VALUES_MESSAGE = "In and NotIn need values, Exists and DoesNotExist take none, Gt and Lt need one whole number"
_RESERVED = r"(^|[.-])(qlora[.]dev|kubernetes[.]io|k8s[.]io)/"
_RESERVED_MESSAGE = "keys with the prefixes qlora.dev, kubernetes.io and k8s.io are set by the operator and Kubernetes"
_DEVICE = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_DEVICE_MESSAGE = "an extended resource is PREFIX/NAME, as in a node's capacity, for example rdma/hca"


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not re.fullmatch(LABEL_KEY, key):
            raise ValueError(f"found {key[:80]!r}, a key is NAME or PREFIX/NAME")
        if re.search(_RESERVED, key):
            raise ValueError(f"found {key[:80]!r}, {_RESERVED_MESSAGE}")
    return labels


def _check_devices(devices: dict[str, int]) -> dict[str, int]:
    for name in devices:
        if not re.fullmatch(_DEVICE, name):
            raise ValueError(f"found {name[:80]!r}, {_DEVICE_MESSAGE}")
    return devices


_KEY_RULES = rules(
    rule("self.all(key, key.size() <= 253)", "a key has at most 253 characters"),
    rule(f"self.all(key, key.matches('{LABEL_KEY}'))", "a key is NAME or PREFIX/NAME"),
    rule(f"!self.exists(key, key.matches('{_RESERVED}'))", _RESERVED_MESSAGE),
)
Key = Annotated[str, Field(max_length=253)]
PodLabels = Annotated[
    dict[Key, LabelValue], Field(max_length=16, json_schema_extra=_KEY_RULES), AfterValidator(_check_labels)
]
PodAnnotations = Annotated[
    dict[Key, Annotated[str, Field(max_length=1024)]],
    Field(max_length=16, json_schema_extra=_KEY_RULES),
    AfterValidator(_check_labels),
]
ExtraResources = Annotated[
    dict[Key, Annotated[int, Field(ge=1, le=1024)]],
    Field(
        max_length=8,
        json_schema_extra=rules(
            rule("self.all(key, key.size() <= 253)", "a key has at most 253 characters"),
            rule(f"self.all(key, key.matches('{_DEVICE}'))", _DEVICE_MESSAGE),
        ),
    ),
    AfterValidator(_check_devices),
]


class NodeRequirement(ApiModel):
    """One requirement on a label of a node."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.operator in ['In', 'NotIn'] ? has(self.values) && self.values.size() > 0 : "
                "self.operator in ['Gt', 'Lt'] ? has(self.values) && self.values.size() == 1 && "
                "self.values[0].matches('^-?[0-9]{1,18}$') : !has(self.values) || self.values.size() == 0",
                _VALUES_MESSAGE,
            )
        )
    )

    key: LabelKey = Field(description="Key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(description="How it compares.")
    values: Annotated[tuple[LabelValue, ...], Field(max_length=32)] | None = Field(
        None, description="Values to compare with."
    )

    @model_validator(mode="after")
    def _as_in_a_pod(self) -> Self:
        values = self.values or ()
        if self.operator in ("In", "NotIn"):
            is_valid = len(values) > 0
        elif self.operator in ("Gt", "Lt"):
            is_valid = len(values) == 1 and re.fullmatch("-?[0-9]{1,18}", values[0]) is not None
        else:
            is_valid = not values
        if not is_valid:
            raise ValueError(_VALUES_MESSAGE)
        return self


class NodeTerm(ApiModel):
    """Nodes that meet all requirements."""

    match_expressions: tuple[NodeRequirement, ...] = Field(
        min_length=1, max_length=8, description="The requirements, all of them."
    )


class RequiredNodes(ApiModel):
    """Nodes that meet one of the terms."""

    node_selector_terms: tuple[NodeTerm, ...] = Field(
        min_length=1, max_length=8, description="The terms, one of them at least."
    )


class PreferredNodes(ApiModel):
    """Nodes that are better than others."""

    weight: int = Field(ge=1, le=100, description="How much better.")
    preference: NodeTerm = Field(description="The preferred nodes.")


class NodeAffinity(ApiModel):
    """Nodes that the pods need, or prefer."""

    required_during_scheduling_ignored_during_execution: RequiredNodes | None = Field(
        None, description="Nodes that the pods need."
    )
    preferred_during_scheduling_ignored_during_execution: tuple[PreferredNodes, ...] = Field(
        (), max_length=8, description="Nodes that the pods prefer."
    )


class PodSelector(ApiModel):
    """Selects pods of the job's namespace by their labels."""

    match_labels: NodeSelector = Field(min_length=1, description="Labels that a pod must have, all of them.")


class PodTerm(ApiModel):
    """Pods, and the domain of their nodes."""

    label_selector: PodSelector = Field(description="Labels of these pods.")
    topology_key: LabelKey = Field(description="Label of nodes whose value names the domain.")


class WeightedPodTerm(ApiModel):
    """The same with a weight."""

    weight: int = Field(ge=1, le=100, description="How much it counts.")
    pod_affinity_term: PodTerm = Field(description="Pods and domain.")


class PodAffinity(ApiModel):
    """Domains with certain pods, to be near them or away from them."""

    required_during_scheduling_ignored_during_execution: tuple[PodTerm, ...] = Field(
        (), max_length=4, description="Conditions that must hold."
    )
    preferred_during_scheduling_ignored_during_execution: tuple[WeightedPodTerm, ...] = Field(
        (), max_length=4, description="Conditions that should hold."
    )


class Affinity(ApiModel):
    """Where the pods are scheduled, as a pod's `affinity` without its rarest fields."""

    node_affinity: NodeAffinity | None = Field(None, description="By labels of nodes.")
    pod_affinity: PodAffinity | None = Field(None, description="Near other pods.")
    pod_anti_affinity: PodAffinity | None = Field(None, description="Away from other pods.")


class TopologySpread(ApiModel):
    """How evenly the train pods of one job on several nodes are spread; the operator selects these pods."""

    max_skew: int = Field(ge=1, le=1024, description="Largest difference of the number of pods between two domains.")
    topology_key: LabelKey = Field(description="Label of nodes whose value names the domain.")
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        "DoNotSchedule", description="Whether a pod waits otherwise."
    )


class ResourceClaim(ApiModel):
    """A claim of devices by dynamic resource allocation (DRA), made for each train pod."""

    name: str = Field(min_length=1, max_length=63, pattern=DNS_LABEL, description="Name within the pod.")
    resource_claim_template_name: ObjectName = Field(
        description="ResourceClaimTemplate, which must exist in each namespace with jobs."
    )


class PodOptions(ApiModel):
    """Where the pods run, and what of the node they get."""

    scheduler_name: ObjectName | None = Field(
        None, description="Scheduler of the pods that nodeSelector is for; the cluster's default if not set."
    )
    node_selector: NodeSelector = Field(
        {}, description="Labels that the nodes must have; a job can add to them, not change them."
    )
    tolerations: Tolerations = Field((), description="Taints that the pods tolerate.")
    affinity: Affinity | None = Field(
        None, description="More conditions on the nodes, for the same pods as nodeSelector."
    )
    topology_spread_constraints: Annotated[tuple[TopologySpread, ...], Field(max_length=4)] | None = Field(
        None, description="How the train pods of a job on several nodes are spread; the scheduler's choice if not set."
    )
    host_users: bool | None = Field(
        None,
        description="As in a pod: with false, users of a pod are no users of the node. Needs idmapped mounts in the "
        "kernel, the runtime and the file system of each volume, and NFS has none; the cluster's default if not set.",
    )
    pod_labels: PodLabels | None = Field(
        None, description="Labels of all pods, for example for a cost report; the operator's labels stay."
    )
    pod_annotations: PodAnnotations | None = Field(
        None, description="Annotations of all pods, for example for a network plugin; the operator's stay."
    )
    extra_resources: ExtraResources | None = Field(
        None,
        description="Extended resources that train requests besides its GPUs, by quantity, for example rdma/hca: 1.",
    )
    resource_claims: Annotated[tuple[ResourceClaim, ...], Field(min_length=1, max_length=8)] | None = Field(
        None,
        description="Devices that train gets by dynamic resource allocation. Without gpuResource, they count as "
        "spec.resources.gpus GPUs of each pod.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )

    @model_validator(mode="after")
    def _claims_have_different_names(self) -> Self:
        claims = self.resource_claims or ()
        if len({claim.name for claim in claims}) < len(claims):
            raise ValueError("resourceClaims: each needs another name")
        return self
