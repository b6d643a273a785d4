"""The administrator's settings for a class of jobs: images, node pools, security identity, limits."""

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.allowed_namespaces import AllowedNamespaces
from qlora_api.connections import (
    PROXY_URL,
    AzureStorage,
    CaConfigMap,
    CloudIdentity,
    DirectHost,
    GoogleStorage,
    NcclSettings,
    TrackingServers,
)
from qlora_api.kubernetes_values import (
    AccessMode,
    GpuMemory,
    LabelKey,
    ObjectName,
    Quantity,
)
from qlora_api.pod_options import PodOptions
from qlora_api.retention import ClaimRetentionPolicy, TtlSeconds
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import REGISTRY

PROFILE_KIND, PROFILE_PLURAL = "QLoRAProfile", "qloraprofiles"
PRICE = r"^[0-9]{1,9}(\.[0-9]{1,6})?$"
RegistryHost = Annotated[str, Field(max_length=260, pattern=rf"^(http://)?{REGISTRY}$")]


_PRICE_AND_CURRENCY = "gpuHourPrice and currency belong together: set both, or neither"
_NEEDS_PROXY = "noProxy and proxySecretName are for httpsProxy: set it, or remove them"


class StepResources(ApiModel):
    """CPU, memory and local storage of one step's pod."""

    cpu: Quantity = Field("2", description="CPU cores, request only: a limit would throttle the step.")
    memory: Quantity = Field("4Gi", description="Memory, request and limit.")
    ephemeral_storage: Quantity | None = Field(
        None,
        description="Local storage of the node, request and limit: 4Gi for /tmp, and the pod's logs; neither if not "
        "set. A queue must then have a quota for ephemeral-storage.",
    )


class Resources(ApiModel):
    """CPU and memory of each step. A job may set those of `train`."""

    prepare: StepResources = Field(StepResources(), description="For downloading, checking, tokenizing and quantizing.")
    train: StepResources = Field(StepResources(cpu="4", memory="24Gi"), description="Host side of the training pod.")
    publish: StepResources = Field(
        StepResources(),
        description="For checking and writing the adapter. A merge (output.merged) or a base in bfloat16 needs 2 GiB "
        "and 8 bytes per weight of the model's largest layer: 4Gi is enough for 70B.",
    )


class RunAs(ApiModel):
    """User and groups of the pods. Not set where the platform (OpenShift) does it."""

    user: int = Field(10001, ge=1, le=2**31 - 1, description="User id.")
    group: int = Field(10001, ge=1, le=2**31 - 1, description="Group id.")
    fs_group: int = Field(10001, ge=1, le=2**31 - 1, description="Group that owns mounted volumes.")
    supplemental_groups_policy: Literal["Merge", "Strict"] | None = Field(
        None,
        description="As in a pod: with Strict, processes have no group of the image. Nodes whose runtime does not "
        "support it reject the pods.",
    )


class WorkspaceDefaults(ApiModel):
    """The claim that the operator creates for a job that names none."""

    topology: Literal["shared", "zonal", "node-local"] = Field(
        "zonal",
        description="Where the volume can be mounted: shared (anywhere), zonal or node-local. "
        "Unless it is shared, prepare and publish run on the nodes of train, without requesting a GPU.",
    )
    storage_class_name: ObjectName | None = Field(None, description="StorageClass; the cluster's default if not set.")
    access_mode: AccessMode = Field("ReadWriteOnce", description="Access mode of the claim.")
    size: Quantity = Field("50Gi", description="Size of the claim.")
    persistent_volume_claim_retention_policy: ClaimRetentionPolicy | None = Field(
        None,
        description="For jobs and sweeps that set no such policy, and whose adapters and merged models are published "
        "outside the claim; Retain if not set.",
    )


class ObjectStoreSettings(ApiModel):
    """The object store of s3:// addresses. A job names its buckets, never a host."""

    endpoint: Annotated[str, Field(max_length=512, pattern=r"^https?://[A-Za-z0-9.:\[\]-]+$")] | None = Field(
        None, description="URL of an S3 server, used with path-style addresses (URL/BUCKET); AWS if not set."
    )
    region: Annotated[str, Field(max_length=64, pattern=r"^[a-z0-9-]+$")] | None = Field(
        None, description="Region of the buckets; us-east-1 if not set."
    )


class SigningKey(ApiModel):
    """A key of a Secret in each namespace with jobs. Publish signs inputs with it."""

    name: ObjectName = Field(
        description="Name of the Secret. Publish waits for it, no other step mounts it, and no job may name it."
    )
    key: str = Field(
        "signing.key",
        min_length=1,
        max_length=253,
        pattern=r"^[-._a-zA-Z0-9]+$",
        description="Key in the Secret: a private key in PEM (PKCS #8, not encrypted), ECDSA P-256 or Ed25519.",
    )


class ModelCache(ApiModel):
    """A claim where the jobs of a namespace share base models in 4-bit."""

    claim_name: ObjectName = Field(
        description="Name of a PersistentVolumeClaim that exists in each namespace with jobs: ReadWriteMany, or a "
        "volume of one node. Only prepare writes to it. No job may name it as workspace, model, data or destination."
    )


class Evaluation(ApiModel):
    """What the benchmarks of a job's gate need."""

    image: str = Field(
        max_length=512,
        description="The trainer image with lm-evaluation-harness, preferably by digest: all steps of jobs with "
        "benchmarks use it, and canary does not apply to them.",
    )
    claim_name: ObjectName = Field(
        description="Name of a PersistentVolumeClaim with tasks, which exists in each namespace with jobs: "
        "ReadOnlyMany, ReadWriteMany, or a volume of one node. No step writes to it."
    )
    path: (
        Annotated[str, Field(max_length=512, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")]
        | None
    ) = Field(
        None,
        description="Folder of the tasks on it: their YAML files, and the data that these name by paths in the folder; "
        "the whole claim if not set.",
    )
    sha256: str = Field(
        max_length=64,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the folder, as `find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | "
        "sha256sum` prints it there. Tasks may hold code: a folder with another sum is not read.",
    )


class Limits(ApiModel):
    """Limits of the profile for the jobs of one namespace."""

    gpus: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="GPUs that one job may request on all its nodes (gpus × nodes); as many as the schema of jobs "
        "allows if not set. A job that asks for more waits with the reason LimitExceeded.",
    )
    workspace_size: Quantity | None = Field(
        None,
        description="Size of the claim that may be created for one job; any if not set. A job that asks for more waits "
        "with the reason LimitExceeded. Claims that users create are a matter of ResourceQuotas.",
    )
    jobs: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Jobs of the profile in one namespace that may have started and not ended; any number if not set. "
        "Suspended jobs count. The others wait with the reason JobLimitReached and start by themselves.",
    )
    gpu_hours: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="GPU hours that one job may use; any number if not set. A job whose spec.budget.gpuHours is more "
        "waits with the reason LimitExceeded; one that sets none gets this one. Jobs that have started keep the limit "
        "that they have started with, until they are retried.",
    )
    ttl_seconds_after_finished: TtlSeconds | None = Field(
        None,
        description="The longest ttlSecondsAfterFinished; any if not set. A job or sweep with a longer one, or with "
        "none, is deleted so many seconds after its end, also if it has ended before the profile got this limit.",
    )
    gpu_hours_per_month: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="GPU hours that all jobs of one namespace may use together in a month (UTC); any number if not "
        "set. Then they save a checkpoint and wait with the reason MonthlyBudgetSpent, also started ones, and continue "
        "with the next month. It is compared at least every five minutes.",
    )


class Canary(ApiModel):
    """Another trainer image for a share of the new jobs."""

    image: str = Field(max_length=512, description="The image, preferably by digest.")
    percent: int = Field(
        ge=1,
        le=100,
        description="Share of new jobs that get it, by a hash of the job's UID, or of its sweep's: cells of a sweep "
        "have one image.",
    )


class Profile(PodOptions):
    """A class of jobs, set up by the administrator. Jobs name it, never change it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.gpuHourPrice) == has(self.currency)", _PRICE_AND_CURRENCY),
            rule(
                "has(self.httpsProxy) || "
                "(!has(self.proxySecretName) && (!has(self.noProxy) || self.noProxy.size() == 0))",
                _NEEDS_PROXY,
            ),
        )
    )

    image: str = Field(max_length=512, description="The trainer image, preferably by digest.")
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent", description="As in a pod.")
    image_pull_secrets: tuple[ObjectName, ...] = Field(
        (), max_length=8, description="Names of the pull secrets in the job's namespace, which no job may name."
    )
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="Device of train. With cuda, a pod that finds no GPU fails instead of training on the CPU."
    )
    gpu_resource: LabelKey | None = Field(
        None, description="Extended resource that train requests for its GPUs, for example nvidia.com/gpu."
    )
    gpu_memory: GpuMemory | None = Field(
        None,
        description="Memory of one GPU, for example 79Gi, for jobs that do not set resources.gpuMemory. Leave it out "
        "if the nodes have GPUs of several sizes, or all have the same, which GPU Feature Discovery has labeled "
        "(status.gpuMemory).",
    )
    gpu_tflops: float | None = Field(
        None,
        ge=0.01,
        le=1e6,
        description="Speed of one GPU in dense bfloat16, without sparsity, in 10^12 operations per second as its "
        "vendor states it, for the forecast of GPU hours before training; no such forecast if not set.",
    )
    gpu_hour_price: Annotated[str, Field(max_length=20, pattern=PRICE)] | None = Field(
        None,
        description='Price of one GPU for one hour, as a decimal number such as "2.50", with currency; no costs are '
        "shown if not set.",
    )
    currency: Annotated[str, Field(max_length=8, pattern=r"^[A-Za-z]+$")] | None = Field(
        None, description="Currency of gpuHourPrice, for example EUR."
    )
    nccl: NcclSettings | None = Field(
        None,
        description="Environment variables for NCCL, such as NCCL_SOCKET_IFNAME or NCCL_DEBUG, in train pods of jobs "
        "with several GPUs or nodes. Names begin with NCCL_.",
    )
    node_wait_seconds: int | None = Field(
        None,
        ge=30,
        le=86_400,
        description="Seconds that the train pods of a job with several nodes wait for one another before they "
        "free their GPUs and try again later; 900 if not set.",
    )
    runtime_class_name: ObjectName | None = Field(None, description="RuntimeClass of the train pod.")
    service_account_name: ObjectName | None = Field(None, description="Service account; its token is never mounted.")
    run_as: RunAs | None = Field(None, description="User and groups of the pods; the platform's choice if not set.")
    allow_job_scheduling: bool = Field(
        False,
        description="Whether a job may set nodeSelector, tolerations and priorityClassName in spec.scheduling, and so "
        "tolerate any taint and preempt others. If false, a job that sets one of them waits with the reason "
        "SchedulingNotAllowed.",
    )
    allowed_namespaces: AllowedNamespaces | None = Field(
        None,
        description="Namespaces whose jobs may use the profile; all if not set. A job of another one waits with the "
        "reason ProfileNotAllowed. Not copied into the status of jobs.",
    )
    limits: Limits | None = Field(
        None, description="Limits for the jobs of one namespace; none if not set. Not copied either."
    )
    paused: bool | None = Field(
        None,
        description="If true, no pod of the profile's jobs starts, and those that run save a checkpoint and stop. The "
        "jobs wait with the reason ProfilePaused, and continue once it is false or not set. Not copied.",
    )
    canary: Canary | None = Field(
        None, description="A new trainer image for some of the new jobs; all get image if not set. Not copied."
    )
    workspace: WorkspaceDefaults = Field(WorkspaceDefaults(), description="Workspace volumes.")
    evaluation: Evaluation | None = Field(
        None,
        description="For jobs whose gate has benchmarks; without it they wait with the reason EvaluationNotAvailable.",
    )
    model_cache: ModelCache | None = Field(
        None, description="Shared base models in 4-bit; each job downloads and quantizes its base if not set."
    )
    resources: Resources = Field(Resources(), description="CPU and memory of each step.")
    hub_endpoint: str | None = Field(
        None, max_length=512, description="URL of the Hugging Face Hub or of a mirror; huggingface.co if not set."
    )
    object_store: ObjectStoreSettings = Field(ObjectStoreSettings(), description="The object store of s3:// addresses.")
    google_storage: GoogleStorage | None = Field(None, description="The object store of gs:// addresses.")
    azure_storage: AzureStorage | None = Field(
        None, description="The object store of az:// addresses, which no job can use if not set."
    )
    cloud_identity: CloudIdentity | None = Field(
        None,
        description="Identity of prepare and publish for the cloud's object store if a job names no Secret; "
        "nothing is signed there if not set.",
    )
    registries: tuple[RegistryHost, ...] = Field(
        (),
        max_length=32,
        description="OCI registries that jobs may name in oci://, as HOST or HOST:PORT; with http:// before one "
        "without TLS. Their token servers must be listed too: credentials are sent to no other host.",
    )
    tracking: TrackingServers | None = Field(
        None, description="Servers of the trackers that jobs name in training.reportTo; no run is uploaded if not set."
    )
    signing_key: SigningKey | None = Field(
        None, description="Signs the lineage of each adapter; a statement without signature is published if not set."
    )
    ca_config_map: CaConfigMap | None = Field(
        None,
        description="Certificates that prepare and publish trust besides the public ones; only those if not set. Pods "
        "wait until the ConfigMap exists, and no job is announced in it.",
    )
    https_proxy: str | None = Field(
        None,
        max_length=512,
        pattern=PROXY_URL,
        description="HTTP proxy (http://HOST:PORT) of prepare and publish for https:// servers, with "
        "CONNECT; none if not set. Servers with http:// are reached directly.",
    )
    no_proxy: tuple[DirectHost, ...] | None = Field(
        None,
        max_length=32,
        description="Hosts that are reached without the proxy: a name stands for itself and all names below it, an "
        "IPv4 address or network for servers that are named by their address.",
    )
    proxy_secret_name: ObjectName | None = Field(
        None,
        description="Secret with username and password of the proxy (type kubernetes.io/basic-auth) in the job's "
        "namespace, which no job may name; the proxy gets no credentials if not set.",
    )
    finished_job_seconds: int = Field(
        86_400,
        ge=3600,
        le=2**31 - 1,
        description="Seconds until a step's finished Job is deleted with its pods and their logs. The status of "
        "the QLoRAJob and the workspace stay. A step whose Job is deleted before the operator has seen its end "
        "runs again, so it must not be away for as long.",
    )
    ttl_seconds_after_finished: TtlSeconds | None = Field(
        None,
        description="ttlSecondsAfterFinished of jobs and sweeps that set none, and announce nothing; they stay if not "
        "set. Counts for those that have ended before it was set, too. Not copied into the status of jobs.",
    )
    termination_grace_period_seconds: int = Field(
        120,
        ge=30,
        le=3600,
        description="Seconds that train has to end a micro batch, and the checkpoint that it is writing, and to save "
        "another before it is killed.",
    )

    @model_validator(mode="after")
    def _price_with_currency(self) -> Self:
        if (self.gpu_hour_price is None) != (self.currency is None):
            raise ValueError(_PRICE_AND_CURRENCY)
        return self

    @model_validator(mode="after")
    def _proxy_has_an_address(self) -> Self:
        if self.https_proxy is None and (self.no_proxy or self.proxy_secret_name):
            raise ValueError(_NEEDS_PROXY)
        return self

    @property
    def gives_gpus(self) -> bool:
        """Whether each train pod has GPUs of its own."""
        return self.gpu_resource is not None or (self.resource_claims is not None and self.device == "cuda")

    def admits(self, namespace: str) -> bool:
        """Whether jobs of the namespace may use it, by names alone."""
        allowed = self.allowed_namespaces
        return allowed is None or namespace in (allowed.names or ())
