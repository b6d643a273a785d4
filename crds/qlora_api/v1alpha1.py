"""The QLoRAJob resource, version v1alpha1: what a user writes (spec)."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.profile import DNS_LABEL, AccessMode, NodeSelector, ObjectName, Quantity, Tolerations
from qlora_api.schema import ApiModel, immutable, rule, rules
from qlora_api.sources import DatasetAddress, FolderAddress, ModelAddress

GROUP = "qlora.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "QLoRAJob"
PLURAL = "qlorajobs"
MAX_NAME_LENGTH = 45

Revision = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class SecretKeyRef(ApiModel):
    """One key of a Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: str = Field(
        "token", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="Key in the Secret."
    )


class BaseModelSpec(ApiModel):
    """The base model, frozen during training."""

    source: ModelAddress = Field(
        description="Where the base model lies: hf://ORG/NAME (Hugging Face Hub) or pvc://CLAIM/PATH (a folder with "
        "config.json, tokenizer and *.safetensors on a volume of this namespace, mounted read-only and not copied)."
    )
    revision: Revision | None = Field(
        None,
        description="Branch, tag or commit of an hf:// model; main if not set. The commit it stands for is recorded.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        None, description="Read token for gated or private repositories. Only the prepare step sees it."
    )


class Columns(ApiModel):
    """Names of the data set's columns, where they differ from the usual ones."""

    messages: ColumnName | None = Field(None, description="Format chat: the list of {role, content}.")
    instruction: ColumnName | None = Field(None, description="Format instruction: what is asked.")
    input: ColumnName | None = Field(None, description="Format instruction: optional further input.")
    output: ColumnName | None = Field(None, description="Format instruction: the answer.")
    prompt: ColumnName | None = Field(None, description="Format prompt-completion: the prompt.")
    completion: ColumnName | None = Field(None, description="Format prompt-completion: the completion.")
    text: ColumnName | None = Field(None, description="Format text: the text.")


class EvalSpec(ApiModel):
    """Rows that are held out for evaluation: either their own source or a fraction of the data set."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("has(self.source) != has(self.fraction)", "set exactly one of source and fraction"),
        )
    )

    source: DatasetAddress | None = Field(None, description="Address of the evaluation rows, of the same format.")
    fraction: float | None = Field(
        None, gt=0, lt=1, description="Fraction of the rows that is held out, chosen by the seed."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.source is None) == (self.fraction is None):
            raise ValueError("set exactly one of source and fraction")
        return self


class DatasetSpec(ApiModel):
    """The training data: JSONL, CSV or Parquet, by file ending."""

    source: DatasetAddress = Field(
        description="Where the rows lie: hf://ORG/NAME[/PATH], pvc://CLAIM/PATH or configMap://NAME/KEY; "
        "a .jsonl, .csv or .parquet file."
    )
    revision: Revision | None = Field(None, description="Branch, tag or commit of an hf:// data set; main if not set.")
    format: Literal["auto", "chat", "instruction", "prompt-completion", "text"] = Field(
        "auto", description="How a row is read. auto decides by the columns and reports what it found."
    )
    columns: Columns | None = Field(None, description="Names of the columns, where they differ from the usual ones.")
    split: ColumnName | None = Field(None, description="Split of an hf:// data set that has several; train if not set.")
    eval: EvalSpec | None = Field(None, description="Rows held out for evaluation; none if not set.")
    max_samples: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Use only the first so many rows; all if not set."
    )
    sha256: str | None = Field(
        None,
        max_length=64,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 that the data file must have; not checked if not set.",
    )


class QuantizationSpec(ApiModel):
    """How the base model is held: 4 bits a weight (arXiv 2305.14314). Computation is always in bfloat16."""

    type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type: NormalFloat (nf4) or float (fp4).")
    double_quant: bool = Field(
        True, description="Quantize the quantization constants too: 4.127 instead of 4.5 bits a weight."
    )


class LoraSpec(ApiModel):
    """The low-rank adapter that is trained."""

    rank: int = Field(
        64, ge=1, le=1024, description="Rank r of the adapter. A server must allow it (vLLM: --max-lora-rank)."
    )
    alpha: int = Field(
        16, ge=1, le=8192, description="Scaling numerator: the adapter's output is multiplied by alpha / rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability on the adapter's input.")
    target_modules: tuple[Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")], ...] = (
        Field(
            ("all-linear",),
            min_length=1,
            max_length=32,
            description="Layers that get an adapter: all-linear (every linear layer of the decoder blocks), "
            "or names such as q_proj.",
        )
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which adapter weights are stored. bfloat16 saves memory but loses small updates.",
    )


class TrainingSpec(ApiModel):
    """How long and how the adapter is trained. The defaults are those of the QLoRA paper."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!(has(self.epochs) && has(self.maxSteps))", "set only one of epochs and maxSteps"),
        )
    )

    epochs: int | None = Field(
        None, ge=1, le=1000, description="Passes over the data; 1 if maxSteps is not set either."
    )
    max_steps: int | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps, instead of epochs.")
    micro_batch_size: int = Field(1, ge=1, le=1024, description="Sequences in one forward pass. Costs GPU memory.")
    gradient_accumulation_steps: int = Field(
        16, ge=1, le=4096, description="Micro batches in one optimizer step. Costs no memory."
    )
    learning_rate: float = Field(
        2e-4, gt=0, le=1, description="Peak learning rate. 1e-4 is advised above 13B parameters."
    )
    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate after the warm-up."
    )
    warmup_steps: int = Field(
        0, ge=0, le=1_000_000, description="Optimizer steps over which the rate rises linearly from 0."
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="Decoupled weight decay.")
    max_grad_norm: float = Field(0.3, gt=0, le=1000, description="Gradients are scaled down to this norm.")
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"] = Field(
        "paged_adamw_32bit", description="AdamW with state in paged memory (32 or 8 bit), or PyTorch's own."
    )
    max_sequence_length: int = Field(
        512, ge=16, le=131_072, description="Tokens in one sequence. Longer rows are left out, counted and reported."
    )
    packing: bool = Field(True, description="Fill each sequence with several rows, which cannot see each other.")
    train_on: Literal["completion", "all"] = Field("completion", description="Tokens that count in the loss.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass. Saves much memory."
    )
    eval_every_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps between evaluations; only at start and end if not set."
    )
    save_every_steps: int = Field(50, ge=1, le=10_000_000, description="Optimizer steps between checkpoints.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of initialization, data order and dropout.")

    @model_validator(mode="after")
    def _only_one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("set only one of epochs and maxSteps")
        return self


class OutputSpec(ApiModel):
    """Where the finished adapter goes."""

    destination: FolderAddress | None = Field(
        None, description="Folder for the adapter, pvc://CLAIM/PATH; `adapter/` in the workspace if not set."
    )


class WorkspaceSpec(ApiModel):
    """The volume on which the steps work: either a claim of yours, or how to make one."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.claimName) || !(has(self.size) || has(self.storageClassName) || has(self.accessModes))",
                "set either claimName, or size, storageClassName and accessModes",
            ),
            rule(
                "!has(self.claimName) || self.retain",
                "retain: false deletes the claim that the operator made; it cannot go with claimName",
            ),
            rule(
                "!has(self.accessModes) || self.accessModes.size() == 1 || "
                "!self.accessModes.exists(mode, mode == 'ReadWriteOncePod')",
                "accessModes: ReadWriteOncePod cannot go with another",
            ),
        )
    )

    claim_name: ObjectName | None = Field(
        None, description="An existing PersistentVolumeClaim of this namespace. The job uses a folder of its own in it."
    )
    size: Quantity | None = Field(
        None, description="Size of the claim to make, for example 100Gi; the profile's if not set."
    )
    storage_class_name: ObjectName | None = Field(None, description="StorageClass; the profile's if not set.")
    access_modes: Annotated[tuple[AccessMode, ...], Field(min_length=1, max_length=3)] | None = Field(
        None, description="Access modes; the profile's if not set."
    )
    retain: bool = Field(
        True,
        description="Keep the claim, and the adapter on it, when the job is deleted. False deletes it with the job.",
    )

    @model_validator(mode="after")
    def _either_or(self) -> Self:
        if self.claim_name is not None and (self.size or self.storage_class_name or self.access_modes):
            raise ValueError("set either claimName, or size, storageClassName and accessModes")
        if self.claim_name is not None and not self.retain:
            raise ValueError("retain: false deletes the claim that the operator made; it cannot go with claimName")
        if self.access_modes is not None and len(self.access_modes) > 1 and "ReadWriteOncePod" in self.access_modes:
            raise ValueError("accessModes: ReadWriteOncePod cannot go with another")
        return self


class ResourcesSpec(ApiModel):
    """What the train pod needs."""

    gpu_memory: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Memory of the GPU card in GiB. If set, a job that cannot fit is refused before it costs anything.",
    )
    cpu: Quantity | None = Field(None, description="CPU cores of the train pod; the profile's if not set.")
    memory: Quantity | None = Field(None, description="Host memory of the train pod; the profile's if not set.")


_PRIORITY_MESSAGE = "priorityClassName: the classes that begin with system- belong to the cluster; name another"


class SchedulingSpec(ApiModel):
    """Where the pods run, within what the profile allows."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.priorityClassName) || !self.priorityClassName.startsWith('system-')", _PRIORITY_MESSAGE)
        )
    )

    profile: str = Field(
        "default",
        min_length=1,
        max_length=63,
        pattern=DNS_LABEL,
        description="The administrator's profile: image, nodes, limits.",
    )
    priority_class_name: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    node_selector: NodeSelector | None = Field(None, description="Further labels that the nodes must have.")
    tolerations: Tolerations | None = Field(None, description="Further taints that the pods tolerate.")

    @model_validator(mode="after")
    def _not_a_system_class(self) -> Self:
        if self.priority_class_name is not None and self.priority_class_name.startswith("system-"):
            raise ValueError(_PRIORITY_MESSAGE)
        return self


class RetrySpec(ApiModel):
    """How often a step is tried again."""

    max_failures: int = Field(3, ge=0, le=20, description="Failures of a step that are retried, with a growing pause.")
    max_disruptions: int = Field(
        20, ge=0, le=1000, description="Interruptions (eviction, preemption, deletion) that are resumed."
    )


MUTABLE_FIELDS = frozenset({"suspend", "active_deadline_seconds", "cleanup_after_seconds"})
"""What may change once a job exists: nothing that decides the adapter."""
_REMEDY = "delete the QLoRAJob and create it again, or create one with another name"
_RETAIN_MESSAGE = (
    "workspace.retain: false would delete the adapter together with the job: "
    "set output.destination to another claim, or retain: true"
)


def _spec_rules(schema: dict[str, Any]) -> None:
    schema.update(
        rules(
            rule("self.workspace.retain || has(self.output.destination)", _RETAIN_MESSAGE),
            *immutable(QLoRAJobSpec, except_for=MUTABLE_FIELDS, remedy=_REMEDY),
        )
    )


class QLoRAJobSpec(ApiModel):
    """One fine-tuning run. Fixed once created, but for suspend, activeDeadlineSeconds and cleanupAfterSeconds."""

    model_config = ConfigDict(json_schema_extra=_spec_rules)

    model: BaseModelSpec = Field(description="The base model.")
    dataset: DatasetSpec = Field(description="The training data.")
    quantization: QuantizationSpec = Field(QuantizationSpec(), description="How the base model is held in memory.")
    lora: LoraSpec = Field(LoraSpec(), description="The adapter.")
    training: TrainingSpec = Field(TrainingSpec(), description="The training run.")
    output: OutputSpec = Field(OutputSpec(), description="Where the adapter goes.")
    workspace: WorkspaceSpec = Field(WorkspaceSpec(), description="The volume on which the steps work.")
    resources: ResourcesSpec = Field(ResourcesSpec(), description="What the train pod needs.")
    scheduling: SchedulingSpec = Field(SchedulingSpec(), description="Where the pods run.")
    retry: RetrySpec = Field(RetrySpec(), description="How often a step is tried again.")
    suspend: bool = Field(
        False, description="Stop (after saving a checkpoint) and free the GPU; false again goes on from there."
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="Seconds that the steps may run in all, without waiting and suspension; no limit if not set.",
    )
    cleanup_after_seconds: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="Seconds after the end when pods, checkpoints and prepared data are deleted; never if not set. "
        "The QLoRAJob and the adapter stay.",
    )

    @model_validator(mode="after")
    def _adapter_outlives_the_job(self) -> Self:
        if not self.workspace.retain and self.output.destination is None:
            raise ValueError(_RETAIN_MESSAGE)
        return self


class ObjectMeta(ApiModel):
    """The part of the metadata that the steps use."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=MAX_NAME_LENGTH, pattern=DNS_LABEL)
    namespace: str = "default"
    uid: str = ""


class QLoRAJobDocument(ApiModel):
    """The manifest: what a user applies, what a pod reads, what `qlora run` takes."""

    api_version: Literal["qlora.dev/v1alpha1"]
    kind: Literal["QLoRAJob"]
    metadata: ObjectMeta
    spec: QLoRAJobSpec
