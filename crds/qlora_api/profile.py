"""What the administrator decides for a class of jobs: images, node pools, security identity, limits."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_api.schema import ApiModel, rule, rules

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
QUANTITY = r"^([0-9]+(\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

Quantity = Annotated[str, Field(max_length=32, pattern=QUANTITY)]
LabelKey = Annotated[str, Field(max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
NodeSelector = Annotated[
    dict[LabelKey, LabelValue],
    # A structural schema has no bound on keys, so that this one needs a rule.
    Field(
        max_length=16,
        json_schema_extra=rules(rule("self.all(key, key.size() <= 317)", "a label key has at most 317 characters")),
    ),
]
AccessMode = Literal["ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"]


class Toleration(ApiModel):
    """Lets the pods run on nodes with a matching taint, as in a pod's `tolerations`."""

    key: str | None = Field(
        None, max_length=317, description="Key of the taint; empty with operator Exists matches all."
    )
    operator: Literal["Exists", "Equal"] | None = Field(
        None, description="How key and value compare; Equal if not set."
    )
    value: str | None = Field(None, max_length=63, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; all effects if not set."
    )
    toleration_seconds: int | None = Field(
        None, ge=0, le=2**31 - 1, description="Seconds that a NoExecute taint is tolerated; for ever if not set."
    )


Tolerations = Annotated[tuple[Toleration, ...], Field(max_length=16)]


class StepResources(ApiModel):
    """Compute of one step's pod, as request and limit."""

    cpu: Quantity = Field("2", description="CPU cores, request only: a limit would throttle tokenization.")
    memory: Quantity = Field("4Gi", description="Memory, request and limit.")


class Resources(ApiModel):
    """Compute of each step. A job may raise what `train` gets."""

    prepare: StepResources = Field(StepResources(), description="For downloading, checking and tokenizing.")
    train: StepResources = Field(StepResources(cpu="4", memory="24Gi"), description="Host side of the training pod.")
    publish: StepResources = Field(StepResources(), description="For checking and writing the adapter.")


class RunAs(ApiModel):
    """The identity of the pods. Left out where the platform assigns one (OpenShift)."""

    user: int = Field(10001, ge=1, le=2**31 - 1, description="User id.")
    group: int = Field(10001, ge=1, le=2**31 - 1, description="Group id.")
    fs_group: int = Field(10001, ge=1, le=2**31 - 1, description="Group that owns mounted volumes.")


class WorkspaceDefaults(ApiModel):
    """How a workspace volume is made when the job does not bring its own claim."""

    topology: Literal["shared", "zonal", "node-local"] = Field(
        "zonal",
        description="Where the volume can be mounted: shared (anywhere), zonal or node-local. "
        "Unless it is shared, prepare and publish run where train may run, without asking for a GPU.",
    )
    storage_class_name: str | None = Field(
        None, max_length=253, description="StorageClass; the cluster's default if not set."
    )
    access_mode: AccessMode = Field("ReadWriteOnce", description="Access mode of the claim.")
    size: Quantity = Field("50Gi", description="Size of the claim.")


class Profile(ApiModel):
    """A class of jobs as the administrator set it up. A job names it; it cannot change anything in it."""

    image: str = Field(max_length=512, description="The trainer image, best by digest.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent", description="As in a pod.")
    image_pull_secrets: tuple[Annotated[str, Field(max_length=253)], ...] = Field(
        (), max_length=8, description="Names of the pull secrets in the job's namespace."
    )
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="What train computes on. With cuda a pod that finds no GPU fails instead of crawling."
    )
    gpu_resource: str | None = Field(
        None, max_length=317, description="Extended resource of which train asks one, for example nvidia.com/gpu."
    )
    runtime_class_name: str | None = Field(None, max_length=253, description="RuntimeClass of the train pod.")
    service_account_name: str | None = Field(
        None, max_length=253, description="Service account; its token is never mounted."
    )
    run_as: RunAs | None = Field(None, description="Identity of the pods; the platform's choice if not set.")
    node_selector: NodeSelector = Field({}, description="Labels of the nodes; a job can add, not change.")
    tolerations: Tolerations = Field((), description="Taints that the pods tolerate.")
    workspace: WorkspaceDefaults = Field(WorkspaceDefaults(), description="Workspace volumes.")
    resources: Resources = Field(Resources(), description="Compute of each step.")
    hub_endpoint: str | None = Field(
        None, max_length=512, description="URL of the model hub; huggingface.co if not set."
    )
    termination_grace_period_seconds: int = Field(
        120, ge=30, le=3600, description="Seconds that train gets to finish a step and save before it is killed."
    )
