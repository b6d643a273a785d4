"""The status of a QLoRAJob: what the operator reports."""

from typing import Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from qlora_api.artifact_status import (
    AdapterStatus,
    BaseStatus,
    GateStatus,
    MergedStatus,
    ReportStatus,
)
from qlora_api.choice import MAX_CHOICES, Choice
from qlora_api.loss_history import MAX_HISTORY_LENGTH, MAX_POINTS
from qlora_api.profile import Profile
from qlora_api.retention import ClaimRetentionPolicy
from qlora_api.schema import ObservedModel
from qlora_api.spec.dataset import MAX_MIX_SOURCES
from qlora_api.spec.output import TrackingStatus
from qlora_api.status_types import MAX_MESSAGE_LENGTH as MAX_MESSAGE_LENGTH
from qlora_api.status_types import MAX_RUNGS
from qlora_api.status_types import MAX_SHORT_TEXT_LENGTH as MAX_SHORT_TEXT_LENGTH
from qlora_api.status_types import Bytes as Bytes
from qlora_api.status_types import Count as Count
from qlora_api.status_types import Finite as Finite
from qlora_api.status_types import Message as Message
from qlora_api.status_types import Share as Share
from qlora_api.status_types import ShortText as ShortText
from qlora_api.status_types import Timestamp as Timestamp
from qlora_api.status_types import Uri as Uri
from qlora_api.usage import ForecastStatus, UsageStatus

MAX_DOCUMENT_LENGTH = 131_072
"""Of a job's document, in UTF-8 bytes: half of what all annotations of a pod may have together."""
MAX_MIXED_SOURCE_LENGTH = 48
MAX_CONDITIONS = 16
"""Twice as many as the operator writes: a later release may add some, and an earlier one must read them."""

Phase = Literal["Pending", "Preparing", "Queued", "Training", "Publishing", "Succeeded", "Failed", "Suspended"]
MemorySource = Literal["DryRun"]
StepName = Literal["prepare", "train", "publish", "clean"]


class Condition(ObservedModel):
    """One observation, as metav1.Condition.

    Types: Prepared, Succeeded, Failed, Suspended (the life of the job), Progressing (whether the running step makes
    progress), Reconciling, Stalled (for tools that wait), CleanedUp.
    """

    type: str = Field(max_length=64, description="The observed property.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(max_length=128, description="Why, in one CamelCase word.")
    message: Message = Field("", description="Why, and what to do, for people.")
    last_transition_time: Timestamp = Field(description="When the status last changed.")
    observed_generation: int = Field(0, ge=-1, le=2**53, description="Generation of the spec that it is about.")


class ContinuedRun(ObservedModel):
    """The workspace of the job of spec.continues, as it was when this job started."""

    job: ShortText
    uid: str = Field(max_length=64)
    claim_name: str = Field(max_length=253)
    workspace_path: str = Field(max_length=256)
    """Its folder on that claim, which prepare reads."""


class Resolved(ObservedModel):
    """Values fixed before the first pod, so that upgrades change no running job: the data of a ControllerRevision."""

    contract_version: int = Field(ge=1, le=1000)
    """Of the contract between operator and trainer."""
    profile: Profile
    """The administrator's profile when the job started, or when it was last retried."""
    canary: bool | None = None
    """Whether the image is that of the profile's canary; None if it is the profile's."""
    claim_name: str = Field(max_length=253)
    claim_created: bool
    """Whether the operator creates the workspace's claim."""
    workspace_path: str = Field(max_length=256)
    """The job's own folder on the claim."""
    shared_path: str | None = Field(None, max_length=256)
    """The folder on the claim that the cells of a sweep share; None for a job that is no cell."""
    document: str = Field(max_length=MAX_DOCUMENT_LENGTH)
    """The part of the spec for the pods, as JSON."""
    continued: ContinuedRun | None = None
    """Location of the run of spec.continues; None without it."""
    gpu_hours: float | None = Field(None, gt=0, le=1e6)
    """GPU hours that the profile allows one job; None without such a limit."""
    queue_name: ShortText | None = None
    """Kueue's LocalQueue of the train step."""
    queue_priority_class_name: ShortText | None = None
    """Kueue's WorkloadPriorityClass of the train step."""


class WorkspaceStatus(ObservedModel):
    """The job's workspace."""

    claim_name: str = Field(max_length=253, description="Its PersistentVolumeClaim.")
    path: str = Field(max_length=256, description="The job's own folder on that claim.")
    retention_policy: ClaimRetentionPolicy | None = Field(
        None, description="The profile's policy when the job started, for what the job's own leaves open."
    )


class StepStatus(ObservedModel):
    """The step that runs, or ran last."""

    name: StepName = Field(description="The step.")
    job_name: str = Field(max_length=63, description="Name of its batch/v1 Job.")
    job_uid: str = Field("", max_length=64, description="UID of that Job; empty until it is known to exist.")
    attempt: int = Field(ge=1, le=100_000, description="Number of Jobs of the step so far.")
    counted_pod: str = Field(
        "", max_length=64, description="UID of its latest pod that failures, disruptions and activeSeconds include."
    )
    failures: int = Field(
        0, ge=0, le=100_000, description="Failures of this step so far, in all its Jobs, for retry.maxFailures."
    )
    running_pod: str = Field("", max_length=64, description="UID of the latest pod that was seen running.")
    running_pod_name: str = Field("", max_length=253, description="Name of that pod.")
    running_since: Timestamp | None = Field(None, description="When that pod's trainer started.")
    progressed_at: Timestamp | None = Field(
        None, description="When the operator last saw that pod start or make progress, by the operator's clock."
    )
    reported_at: Timestamp | None = Field(None, description="When that progress was made, by the trainer's clock.")
    nodes: Count | None = Field(None, description="Number of pods that train together; not set if it is one.")
    running_nodes: Count | None = Field(None, description="Number of these that run now.")
    unverified: int = Field(0, ge=0, le=100, description="Number of its Jobs that completed without a readable result.")


class EvaluationStatus(ObservedModel):
    """One evaluation of a run."""

    step: Count = Field(description="Optimizer steps done.")
    eval_loss: Finite = Field(description="Loss on the held-out rows.")


class ProgressStatus(ObservedModel):
    """Progress of training. Values are the latest; the report has their history."""

    step: Count = Field(0, description="Optimizer steps done.")
    total_steps: Count = Field(0, description="Optimizer steps in all.")
    percent: int = Field(
        0, ge=0, le=100, description="Steps done, in percent; 100 once training.earlyStopping has ended the run."
    )
    epoch: Finite = Field(0.0, ge=0, le=1e9, description="Passes over the data so far.")
    loss: Finite | None = Field(
        None,
        description="Training loss in the latest step (natural log): per target token, or per pair if the objective "
        "compares two answers.",
    )
    eval_loss: Finite | None = Field(
        None, description="Loss on the held-out rows in the latest evaluation; of the finished adapter at the end."
    )
    reward_margin: Finite | None = Field(
        None,
        description="Objectives that compare two answers: by how much the implicit reward of the chosen answer exceeds "
        "that of the rejected one, in nats, as the mean of the latest step.",
    )
    accuracy: Share | None = Field(
        None, description="Share of the latest step's pairs whose chosen answer has the higher implicit reward."
    )
    eval_accuracy: Share | None = Field(
        None,
        description="Share of the held-out pairs with that preference, in the latest evaluation; of the finished "
        "adapter at the end.",
    )
    evaluations: tuple[EvaluationStatus, ...] | None = Field(
        None,
        max_length=MAX_RUNGS,
        description="The evaluations at the rungs of a sweep with spec.halving; not set for another job.",
    )
    learning_rate: Finite | None = Field(None, description="Learning rate of the latest step.")
    outcome: Message = Field("", description="How training ended, for people; empty before.")
    tokens_per_second: Finite | None = Field(None, description="Tokens per second, without padding.")
    peak_memory_bytes: Bytes | None = Field(None, description="Peak GPU memory (on CPU: resident memory).")
    micro_batch_size: Count | None = Field(
        None, description="The lower microBatchSize by autoMicroBatch; not set if it was not lowered."
    )
    goodput: Share | None = Field(
        None,
        description="Share of the time of all train pods, from 0 to 1, that is in the adapter: optimizer steps and "
        "evaluations that no interruption has undone. The rest is loading, saving and steps that were repeated.",
    )
    summary: ShortText = Field(
        "", description='Progress for people, for example "42% 420/1000", or "stopped early 420/1000".'
    )
    remaining: ShortText = Field("", description='Time left for training, for example "1h12m".')
    remaining_seconds: Count | None = Field(None, description="The same in seconds, for programs.")
    updated_at: Timestamp | None = Field(None, description="When the trainer reported this.")


class MemoryStatus(ObservedModel):
    """GPU memory that the run is expected to need, estimated before any download."""

    estimate_bytes: Bytes | None = Field(None, description="Expected peak; not set if it is unknown.")
    low_bytes: Bytes | None = Field(None, description="Lower end of what is plausible; not set if it is unknown.")
    high_bytes: Bytes | None = Field(None, description="Upper end of what is plausible; not set if it is unknown.")
    budget_bytes: Bytes | None = Field(
        None, description="Usable memory of the GPU; not set if neither job, profile nor nodes have it."
    )
    verdict: Literal["fits", "tight", "exceeds", "unknown"] = Field(
        description="Whether the run fits the GPU; unknown if its memory or the estimate is."
    )
    shared_bytes: Bytes | None = Field(
        None,
        description="Of a cell that one pod trains with others: the part of the estimate that all of them need once, "
        "such as the base; each needs the rest. Not set for any other job, or if unknown.",
    )
    source: MemorySource | None = Field(
        None,
        description="Where the estimate is from: a training step of the model's layers without data (DryRun); not set "
        "if it is unknown.",
    )
    message: Message = Field(
        "",
        description="Why the dry run failed, if it did; of a tight run what to change first, and of one that fits a "
        "larger micro batch that fits too.",
    )
    peak_bytes: Bytes | None = Field(None, description="Measured peak of the run, for comparison.")


class MixedSourceStatus(ObservedModel):
    """Counts of prepare for one source of the mix, in a result of 4096 bytes."""

    source: str = Field(max_length=MAX_MIXED_SOURCE_LENGTH, description="Its address, shortened in the middle.")
    rows: Count = Field(description="Rows read.")
    used_rows: Count = Field(description="Rows that an epoch's rows are drawn from.")
    epoch_rows: Count = Field(description="Rows drawn in each epoch; if more than usedRows, some of them repeatedly.")
    tokens: Count = Field(description="Tokens of these, on average over the epochs.")


class DatasetStatus(ObservedModel):
    """Counts of prepare for the data set."""

    format: ShortText = Field(description="The format, as set or as detected.")
    rows: Count = Field(description="Rows read.")
    used_rows: Count = Field(description="Rows that are trained on.")
    eval_rows: Count = Field(0, description="Rows that are held out.")
    too_long_rows: Count = Field(0, description="Rows left out because they exceed training.maxSequenceLength.")
    longest_row_tokens: Count = Field(0, description="Tokens of the longest row.")
    duplicate_rows: Count = Field(
        0, description="Rows whose tokens are those of an earlier row; left out if dataset.deduplicate is set."
    )
    overlap_rows: Count = Field(
        0, description="Rows for training that are also held out, token for token; left out if eval.overlap is drop."
    )
    tokens: Count = Field(0, description="Tokens trained on in one epoch; with a mix, on average.")
    sha256: str = Field(
        "", max_length=64, description="SHA-256 of the data file; of a mix, of the lines SHA-256, two spaces, address."
    )
    sources: tuple[MixedSourceStatus, ...] | None = Field(
        None,
        max_length=MAX_MIX_SOURCES,
        description="The sources of the mix, in its order; not set without one, or if prepare's result would be too "
        "long.",
    )


class CheckpointStatus(ObservedModel):
    """The latest checkpoint, the start of a resumed run."""

    step: Count = Field(description="Optimizer steps done.")
    saved_at: Timestamp = Field(description="When it was saved.")


class AnnouncementStatus(ObservedModel):
    """The entry of output.announce: written, or rejected with a reason."""

    entry: str | None = Field(
        None, max_length=512, description="Its ConfigMap and key, CONFIGMAP/KEY; not set if rejected."
    )
    rejection: Message = Field("", description="Why the entry is not written, and what to do; the operator retries.")


class FailureStatus(ObservedModel):
    """The latest failure, also of an attempt that is retried."""

    step: StepName = Field(description="The step that failed.")
    reason: str = Field(max_length=128, description="Why, in one CamelCase word.")
    exit_code: int | None = Field(None, ge=0, le=255, description="Exit code of the trainer.")
    message: Message = Field("", description="The cause and the remedy.")
    time: Timestamp = Field(description="When the attempt ended, or when the failure was seen.")


class QLoRAJobStatus(ObservedModel):
    """The operator's report about a job. The conditions are authoritative."""

    observed_generation: int | None = Field(
        None, ge=-1, le=2**53, description="Generation of the spec that the status is about."
    )
    phase: Phase | None = Field(None, description="Summary of the conditions, for people.")
    phase_since: Timestamp | None = Field(None, description="When the phase last changed.")
    waited_seconds: Count = Field(
        0, description="Seconds in the phases Pending, Queued and Suspended, up to when the job last left one of them."
    )
    conditions: tuple[Condition, ...] = Field(
        (),
        max_length=MAX_CONDITIONS,
        description="Observations by type; `kubectl wait --for=condition=Succeeded` works.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    current_revision: str | None = Field(
        None,
        max_length=253,
        description="The ControllerRevision with what was fixed before the first pod: the profile, the image and the "
        "part of the spec that pods read.",
    )
    resolved: SkipJsonSchema[Resolved | None] = Field(None, exclude=True)
    """The data of that ControllerRevision: in memory only."""
    run_uid: str | None = Field(
        None,
        max_length=64,
        description="UID of the job that began the run, as its records and its adapter name it; not set if that is "
        "this one's own. A job that was restored from a backup has it.",
    )
    image: str | None = Field(None, max_length=512, description="The trainer's image; not set before it has started.")
    workspace: WorkspaceStatus | None = Field(None, description="The job's workspace; not set before it has started.")
    model_revision: ShortText | None = Field(
        None, description="Commit (hf://), or digest of the artifact (oci://) or the content, of the base model."
    )
    queue_name: ShortText | None = Field(None, description="Kueue's LocalQueue of the train step; not set without one.")
    gpu_hours_limit: float | None = Field(
        None, gt=0, le=1e6, description="GPU hours that the profile allows the job; not set without such a limit."
    )
    step: StepStatus | None = Field(None, description="The step that runs, or ran last.")
    progress: ProgressStatus | None = Field(None, description="Progress of training.")
    history: str | None = Field(
        None,
        max_length=MAX_HISTORY_LENGTH,
        description=f"Losses of the run as CSV with a line for the columns, at most {MAX_POINTS} points: the first, "
        "the latest, and evaluations before others. The file metrics.csv next to the adapter has every step.",
    )
    memory: MemoryStatus | None = Field(None, description="GPU memory, estimated and measured.")
    dataset: DatasetStatus | None = Field(None, description="Counts of prepare for the data set.")
    settings: tuple[Choice, ...] | None = Field(
        None,
        max_length=MAX_CHOICES,
        description="The settings that the spec leaves open, as prepare chose them; not set if it leaves none open.",
    )
    base: BaseStatus | None = Field(None, description="How prepare got the base model.")
    checkpoint: CheckpointStatus | None = Field(None, description="The latest checkpoint.")
    gate: GateStatus | None = Field(None, description="Whether the adapter has passed spec.gate; not set without one.")
    adapter: AdapterStatus | None = Field(None, description="The finished adapter.")
    merged: MergedStatus | None = Field(None, description="The merged model, if output.merged is set.")
    report: ReportStatus | None = Field(
        None, description="The published page of the run; not set with output.report none. The workspace has it too."
    )
    announcement: AnnouncementStatus | None = Field(
        None, description="The entry of output.announce; not set without one, and before it was tried."
    )
    tracking: TrackingStatus | None = Field(
        None, description="The run on the servers of trackers; not set if the job and its profile name none."
    )
    failures: Count = Field(0, description="Attempts so far that ended with an error.")
    disruptions: Count = Field(
        0,
        description="Attempts so far whose pod was evicted, preempted by a pod, or deleted. Suspensions do not count.",
    )
    first_attempt: int = Field(
        1,
        ge=1,
        le=100_000,
        description="Number of each step's first Job; higher than any before once the job is retried.",
    )
    highest_attempt: int = Field(0, ge=0, le=100_000, description="The highest number of a Job so far, if it is not 1.")
    retry_request: ShortText | None = Field(None, description="The latest retry.request that has been seen.")
    active_seconds: Count = Field(0, description="Seconds that finished attempts have run, for activeDeadlineSeconds.")
    active_until: Timestamp | None = Field(None, description="End of the time that activeSeconds includes.")
    usage: UsageStatus | None = Field(
        None, description="GPU time used and lost; not set before a pod has had a GPU, or if the profile requests none."
    )
    forecast: ForecastStatus | None = Field(
        None, description="GPU hours that the job is expected to take; not set while that is unknown."
    )
    last_failure: FailureStatus | None = Field(None, description="The latest failure.")
    start_time: Timestamp | None = Field(None, description="When the operator first saw the job.")
    completion_time: Timestamp | None = Field(None, description="When the job ended.")
    claim_deletion_time: Timestamp | None = Field(
        None,
        description="When the operator deleted the claim that it had created for the workspace, by whenFinished of its "
        "retention policy.",
    )
