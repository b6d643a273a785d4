"""The QLoRAJob resource, version v1beta1: what a user writes (spec)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import DNS_LABEL, ManagedBy
from qlora_api.retention import TtlSeconds
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import OBJECT_STORES, prefixes, scheme_of
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.execution import RetrySpec, SchedulingSpec, WorkspaceSpec
from qlora_api.spec.gate import BenchmarkSpec, GateSpec, GuardSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.output import OutputSpec, gguf_rules, reject_unconvertible, reject_untracked, tracking_rules
from qlora_api.spec.training import LoraSpec, QuantizationSpec, ResourcesSpec, TrainingSpec
from qlora_api.usage import BudgetSpec

GROUP = "qlora.dev"
VERSION = "v1beta1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "QLoRAJob"
PLURAL = "qlorajobs"
MAX_NAME_LENGTH = 45
JobName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH, pattern=DNS_LABEL)]

MUTABLE_FIELDS = frozenset(
    {
        "suspend",
        "cancel",
        "active_deadline_seconds",
        "cleanup_after_seconds",
        "ttl_seconds_after_finished",
        "progress_deadline_seconds",
        "retry",
        "gate",
        "budget",
    }
)
"""What may change once a job exists: nothing that decides the adapter.

Of `resources`, `memory` may, and of `workspace` the retention policy. Of `gate`, `score` and the rows of `guards` may
not: training has measured them. `cancel` may only become true.
"""
STEP_FIELDS = ("model", "dataset", "quantization", "lora", "training", "output", "resources", "gate", "continues")
"""The parts of the spec that the pods read, if they are set; the others are for the operator only."""
REMEDY = "delete the QLoRAJob and create it again, or create one with another name"
POLICY_FIELD = "persistent_volume_claim_retention_policy"
_POLICY = "workspace.persistentVolumeClaimRetentionPolicy"
_ADAPTER_ON_THE_CLAIM = f"{_POLICY}: Delete would delete the adapter: set output.destination, or Retain"
_MERGED_ON_THE_CLAIM = f"{_POLICY}: Delete would delete the merged model: set output.merged.destination, or Retain"
KEEPS_CLAIM = (
    "(self.workspace.?persistentVolumeClaimRetentionPolicy.?whenDeleted.orValue('Retain') == 'Retain' && "
    "self.workspace.?persistentVolumeClaimRetentionPolicy.?whenFinished.orValue('Retain') == 'Retain')"
)
"""CEL, on the spec of a job: that its policy never deletes its claim."""
_SHARDED_ALONE = (
    "training.sharding: full shards the base over several GPUs: set resources.gpus or resources.nodes to 2 or more, or "
    "remove sharding"
)
_SHARDED_AND_MERGED = (
    "output.merged needs the whole base in one process, and training.sharding: full shards it: remove one of them"
)
_SHARDED_AND_HALVED = (
    "training.autoMicroBatch repeats a step, which training.sharding: full does not support: remove one of them, "
    "or set a smaller microBatchSize"
)
_PAIRS_NEEDED = (
    "training.objective dpo and orpo compare two answers: set dataset.format to preference, or leave it auto"
)
_PAIRS_UNUSED = (
    "dataset.format preference needs an objective that compares two answers: set training.objective to dpo or orpo"
)
_GATE_AND_NO_ROWS = "gate is decided on held-out rows: set dataset.eval to some, or remove gate"
_SCORE_AND_SHARDED = (
    "gate.score needs the whole base in one process, and training.sharding: full shards it: remove one of them"
)
_SCORE_AND_NO_PROMPTS = (
    "gate.score answers the prompts of held-out rows, and training.trainOn: all trains on prompts like answers: set "
    "trainOn to completion, or remove gate.score"
)
_CHECKS_NEEDED = (
    "gate.score: check jsonSchema needs schema, check regex needs pattern; or each row brings its own: then name the "
    "column in dataset.columns.check, with a mix in the columns of each source of held-out rows"
)
_CHECKS_UNUSED = (
    "dataset.columns.check is for a gate.score whose check is regex or jsonSchema and that has no pattern or schema: "
    "remove one of them"
)
_GUARDS_AND_SHARDED = (
    "gate.guards need the whole base in one process, and training.sharding: full shards it: remove one of them"
)
_GUARDS_AND_PAIRS = (
    "gate.guards compare losses per token, and training.objective dpo and orpo train on pairs: remove guards"
)
_BENCHMARKS_AND_SHARDED = (
    "gate.benchmarks need the whole base in one process, and training.sharding: full shards it: remove one of them"
)
_NO_OBJECTS = (
    f"dataset.secretRef is for {prefixes(OBJECT_STORES, 'and')} data; an hf:// data set is read with "
    "model.tokenSecretRef"
)
_IN_BUCKET = f"source.matches('^({'|'.join(OBJECT_STORES)})://')"
HAS_SCORE = "has(self.gate) && has(self.gate.score)"
HAS_GUARDS = "has(self.gate) && has(self.gate.guards)"
HAS_BENCHMARKS = "has(self.gate) && has(self.gate.benchmarks)"
_SCORE_OF_ROWS = (
    f"({HAS_SCORE} && self.gate.score.check != 'exactMatch' && !has(self.gate.score.schema) && "
    "!has(self.gate.score.pattern))"
)
_HAS_CHECK = "(has({0}.columns) && has({0}.columns.check))"
_HAVE_CHECKS = (
    f"(has(self.dataset.mix) ? (has(self.dataset.eval) && has(self.dataset.eval.source) ? "
    f"{_HAS_CHECK.format('self.dataset.mix[0]')} : self.dataset.mix.all(part, {_HAS_CHECK.format('part')})) : "
    f"{_HAS_CHECK.format('self.dataset')})"
)
_HAS_ANY_CHECK = (
    f"({_HAS_CHECK.format('self.dataset')} || (has(self.dataset.mix) && "
    f"self.dataset.mix.exists(part, {_HAS_CHECK.format('part')})))"
)

_WHOLE_MICRO_BATCHES = (
    "training.batchSize must be a multiple of training.microBatchSize × resources.gpus × resources.nodes: change one "
    "of them, or remove microBatchSize"
)
_HOLDS_OUT_NONE = "has(self.dataset.eval) && has(self.dataset.eval.fraction) && self.dataset.eval.fraction == 0.0"
_BEST_OF_NOTHING = (
    "training.keep: best compares adapters by their loss on held-out rows, and dataset.eval.fraction is 0: raise it, "
    "or remove keep"
)
_STOPPED_BY_NOTHING = (
    "training.earlyStopping watches the loss on held-out rows, and dataset.eval.fraction is 0: raise it, or remove "
    "earlyStopping"
)


def _spec_rules(schema: dict[str, Any]) -> None:
    schema.update(
        rules(
            rule(f"has(self.output.destination) || {KEEPS_CLAIM}", _ADAPTER_ON_THE_CLAIM),
            rule(
                f"!has(self.output.merged) || has(self.output.merged.destination) || {KEEPS_CLAIM}",
                _MERGED_ON_THE_CLAIM,
            ),
            rule(
                "self.training.sharding != 'full' || self.resources.gpus > 1 || "
                "(has(self.resources.nodes) && self.resources.nodes > 1)",
                _SHARDED_ALONE,
            ),
            rule("self.training.sharding != 'full' || !has(self.output.merged)", _SHARDED_AND_MERGED),
            rule(
                "self.training.sharding != 'full' || !has(self.training.autoMicroBatch) || "
                "!self.training.autoMicroBatch",
                _SHARDED_AND_HALVED,
            ),
            rule(
                "!has(self.training.batchSize) || !has(self.training.microBatchSize) || self.training.batchSize % "
                "(self.training.microBatchSize * self.resources.gpus * self.resources.?nodes.orValue(1)) == 0",
                _WHOLE_MICRO_BATCHES,
            ),
            rule(
                "!has(self.training.objective) || self.training.objective == 'supervised' || "
                "(self.dataset.format in ['auto', 'preference'] && (!has(self.dataset.mix) || "
                "self.dataset.mix.all(part, part.format in ['auto', 'preference'])))",
                _PAIRS_NEEDED,
            ),
            rule(
                "(self.dataset.format != 'preference' && (!has(self.dataset.mix) || "
                "!self.dataset.mix.exists(part, part.format == 'preference'))) || "
                "(has(self.training.objective) && self.training.objective != 'supervised')",
                _PAIRS_UNUSED,
            ),
            rule(f"!has(self.training.keep) || self.training.keep != 'best' || !({_HOLDS_OUT_NONE})", _BEST_OF_NOTHING),
            rule(f"!has(self.training.earlyStopping) || !({_HOLDS_OUT_NONE})", _STOPPED_BY_NOTHING),
            rule(
                f"!has(self.gate) || (has(self.dataset.eval) && !({_HOLDS_OUT_NONE})) || "
                "(!has(self.gate.minImprovement) && !has(self.gate.maxEvalLoss) && !has(self.gate.score))",
                _GATE_AND_NO_ROWS,
            ),
            rule(f"!({HAS_GUARDS}) || self.training.sharding != 'full'", _GUARDS_AND_SHARDED),
            rule(f"!({HAS_BENCHMARKS}) || self.training.sharding != 'full'", _BENCHMARKS_AND_SHARDED),
            rule(
                f"!({HAS_GUARDS}) || !has(self.training.objective) || self.training.objective == 'supervised'",
                _GUARDS_AND_PAIRS,
            ),
            rule(
                f"!has(self.dataset.secretRef) || (has(self.dataset.source) && self.dataset.{_IN_BUCKET}) || "
                f"(has(self.dataset.mix) && self.dataset.mix.exists(part, part.{_IN_BUCKET})) || "
                f"(has(self.dataset.eval) && has(self.dataset.eval.source) && self.dataset.eval.{_IN_BUCKET}) || "
                f"({HAS_GUARDS} && self.gate.guards.exists(guard, guard.{_IN_BUCKET}))",
                _NO_OBJECTS,
            ),
            rule(f"!({HAS_SCORE}) || self.training.sharding != 'full'", _SCORE_AND_SHARDED),
            rule(f"!({HAS_SCORE}) || self.training.trainOn != 'all'", _SCORE_AND_NO_PROMPTS),
            rule(f"!{_SCORE_OF_ROWS} || {_HAVE_CHECKS}", _CHECKS_NEEDED),
            rule(f"{_SCORE_OF_ROWS} || !{_HAS_ANY_CHECK}", _CHECKS_UNUSED),
            *tracking_rules(),
            *gguf_rules(),
        )
    )


class QLoRAJobSpec(ApiModel):
    """One fine-tuning run. Immutable, except what does not decide the adapter.

    Mutable: suspend, cancel, activeDeadlineSeconds, progressDeadlineSeconds, cleanupAfterSeconds,
    ttlSecondsAfterFinished, budget, retry, gate except its score, the rows of its guards and the tasks of its
    benchmarks, resources.memory, and workspace.persistentVolumeClaimRetentionPolicy.
    """

    model_config = ConfigDict(json_schema_extra=_spec_rules)

    model: BaseModelSpec = Field(description="The base model.")
    dataset: DatasetSpec = Field(description="The training data.")
    quantization: QuantizationSpec = Field(default=QuantizationSpec(), description="How the base model is quantized.")
    lora: LoraSpec = Field(default=LoraSpec(), description="The adapter.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="The training run.")
    output: OutputSpec = Field(default=OutputSpec(), description="Where the adapter is published.")
    gate: GateSpec | None = Field(
        default=None,
        description="Conditions for publishing the adapter; none if not set. A change counts from the "
        "job's next step on, and for a failed job that is retried; removing the whole gate only for the latter.",
    )
    continues: JobName | None = Field(
        default=None,
        description="Another QLoRAJob of this namespace, whose run continues at its newest checkpoint. Model, data "
        "and settings that decide the adapter must be the same. Starts when that job has ended or is suspended.",
    )
    workspace: WorkspaceSpec = Field(default=WorkspaceSpec(), description="The volume that the steps share.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="GPUs, CPU and memory of the train pods.")
    scheduling: SchedulingSpec = Field(default=SchedulingSpec(), description="Where the pods run.")
    retry: RetrySpec = Field(default=RetrySpec(), description="Limits of retries and resumptions.")
    suspend: bool = Field(
        default=False,
        description="true saves a checkpoint, stops the job and frees the GPU; false resumes it from there.",
    )
    cancel: bool | None = Field(
        default=None,
        description="true ends the job for good, unless it has ended: it fails with the reason Cancelled, its pods "
        "stop, its checkpoints and prepared data are deleted, and it cannot be retried. Cannot be taken back.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds that the steps may run in total, not counting time in queues and suspension; no limit if "
        "not set.",
    )
    budget: BudgetSpec | None = Field(default=None, description="GPU hours that the job may use; no limit if not set.")
    progress_deadline_seconds: int | None = Field(
        default=None,
        ge=60,
        le=2**31 - 1,
        description="Seconds without any progress of a running step until the condition Progressing becomes "
        "False; 3600 if not set. retry.onNoProgress decides the consequence.",
    )
    cleanup_after_seconds: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Seconds from the end to the deletion of pods, checkpoints, prepared data and the base; never if "
        "not set. The QLoRAJob and the adapter stay.",
    )
    ttl_seconds_after_finished: TtlSeconds | None = Field(
        default=None,
        description="Seconds from the end to the deletion of the QLoRAJob with its Jobs and pods; the profile's if not "
        "set, or never. A clean-up that is due by then comes first.",
    )
    managed_by: ManagedBy | None = Field(
        default=None,
        description="The controller of this job, as in a Job of Kubernetes: qlora.dev/operator or not set is this "
        "operator, which leaves a job with another value alone.",
    )

    @property
    def guards(self) -> tuple[GuardSpec, ...]:
        """The guards of the gate, or none."""
        return () if self.gate is None else self.gate.guards or ()

    @property
    def benchmarks(self) -> tuple[BenchmarkSpec, ...]:
        """The benchmarks of the gate, or none."""
        return () if self.gate is None else self.gate.benchmarks or ()

    @property
    def data_addresses(self) -> Mapping[str, str]:
        """The addresses of rows, by the path of their fields."""
        guards = {f"spec.gate.guards[{number}].source": guard.source for number, guard in enumerate(self.guards)}
        return {**self.dataset.addresses, **guards}

    @model_validator(mode="after")
    def _secret_has_a_use(self) -> Self:
        schemes = {scheme_of(uri) for uri in self.data_addresses.values()}
        if self.dataset.secret_ref and not schemes.intersection(OBJECT_STORES):
            raise ValueError(_NO_OBJECTS)
        return self

    @model_validator(mode="after")
    def _adapter_outlives_the_claim(self) -> Self:
        if not self.workspace.deletes_claim or self.output.is_outside_workspace:
            return self
        raise ValueError(_ADAPTER_ON_THE_CLAIM if self.output.destination is None else _MERGED_ON_THE_CLAIM)

    @model_validator(mode="after")
    def _sharded_base(self) -> Self:
        if self.training.sharding == "full":
            if self.resources.gpu_count == 1:
                raise ValueError(_SHARDED_ALONE)
            if self.output.merged is not None:
                raise ValueError(_SHARDED_AND_MERGED)
            if self.training.auto_micro_batch:
                raise ValueError(_SHARDED_AND_HALVED)
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> Self:
        training = self.training
        micro, is_decided = training.micro_batch_size, training.gradient_accumulation_steps is not None
        # GPUs may share chosen micro batches unevenly.
        if training.batch_size is None or micro is None or is_decided:
            return self
        if training.batch_size % (micro * self.resources.gpu_count):
            raise ValueError(_WHOLE_MICRO_BATCHES)
        return self

    @model_validator(mode="after")
    def _data_of_the_objective(self) -> Self:
        formats = {source.format for source in self.dataset.training_sources.values()}
        if self.training.compares_answers and formats - {"auto", "preference"}:
            raise ValueError(_PAIRS_NEEDED)
        if not self.training.compares_answers and "preference" in formats:
            raise ValueError(_PAIRS_UNUSED)
        return self

    @model_validator(mode="after")
    def _held_out_rows_to_judge_by(self) -> Self:
        if self.dataset.eval is None or self.dataset.holds_out:
            return self
        if self.training.keep == "best":
            raise ValueError(_BEST_OF_NOTHING)
        if self.training.early_stopping is not None:
            raise ValueError(_STOPPED_BY_NOTHING)
        return self

    @model_validator(mode="after")
    def _rows_bring_what_is_asked_for(self) -> Self:
        score = None if self.gate is None else self.gate.score
        of_rows = score is not None and score.of_rows
        named = [source.columns and source.columns.check for source in self.dataset.training_sources.values()]
        of_first = self.dataset.eval is not None and self.dataset.eval.source is not None
        if of_rows and None in (named[:1] if of_first else named):
            raise ValueError(_CHECKS_NEEDED)
        if not of_rows and any(named):
            raise ValueError(_CHECKS_UNUSED)
        return self

    @model_validator(mode="after")
    def _tracking_has_a_use(self) -> Self:
        reject_untracked(self.output.tracking, self.training)
        return self

    @model_validator(mode="after")
    def _gguf_can_be_made(self) -> Self:
        reject_unconvertible(self.output.gguf, self.lora)
        return self

    @model_validator(mode="after")
    def _gate_can_be_decided(self) -> Self:
        if self.gate is None:
            return self
        if self.gate.judges_evaluation and not self.dataset.holds_out:
            raise ValueError(_GATE_AND_NO_ROWS)
        if self.guards and self.training.sharding == "full":
            raise ValueError(_GUARDS_AND_SHARDED)
        if self.benchmarks and self.training.sharding == "full":
            raise ValueError(_BENCHMARKS_AND_SHARDED)
        if self.guards and self.training.compares_answers:
            raise ValueError(_GUARDS_AND_PAIRS)
        if self.gate.score is not None and self.training.sharding == "full":
            raise ValueError(_SCORE_AND_SHARDED)
        if self.gate.score is not None and self.training.train_on == "all":
            raise ValueError(_SCORE_AND_NO_PROMPTS)
        return self


_CONTINUES_ITSELF = "spec.continues names this job itself: name the job whose checkpoint is to be taken up"
OTHER_JOB_RULE = rule("!has(self.spec.continues) || self.spec.continues != self.metadata.name", _CONTINUES_ITSELF)
"""For the whole object: the spec does not know the job's name."""


class ObjectMeta(ApiModel):
    """The part of the metadata that the steps use."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(max_length=MAX_NAME_LENGTH, pattern=DNS_LABEL)
    namespace: str = "default"
    uid: str = ""


class QLoRAJobDocument(ApiModel):
    """The manifest: what a user applies, what a pod reads, what `qlora run` takes."""

    api_version: Literal["qlora.dev/v1beta1"]
    kind: Literal["QLoRAJob"]
    metadata: ObjectMeta
    spec: QLoRAJobSpec

    @model_validator(mode="after")
    def _continues_another_job(self) -> Self:
        if self.spec.continues == self.metadata.name:
            raise ValueError(_CONTINUES_ITSELF)
        return self
