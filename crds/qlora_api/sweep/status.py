"""The status of a QLoRASweep: what the operator reports."""

from typing import Literal

from pydantic import Field

from qlora_api.joinable import MAX_TOGETHER
from qlora_api.schema import ObservedModel
from qlora_api.status import (
    MAX_CONDITIONS,
    Condition,
    Count,
    FailureStatus,
    Finite,
    Message,
    Share,
    ShortText,
    StepStatus,
    Timestamp,
    Uri,
)
from qlora_api.status_types import MAX_RUNGS, GpuTime
from qlora_api.usage import UsageStatus

SweepPhase = Literal["Pending", "Running", "Suspended", "Succeeded", "Failed"]
CellPhase = Literal[
    "Pending",
    "Preparing",
    "Queued",
    "Training",
    "Publishing",
    "Succeeded",
    "Failed",
    "Suspended",
    "Stopped",
    "Deleted",
]


class RungStatus(ObservedModel):
    """A cell's comparison at a rung of spec.halving with the losses known then."""

    step: Count = Field(description="Optimizer steps of the rung.")
    eval_loss: Finite = Field(description="Loss of the cell on the held-out rows there.")
    rank: int = Field(ge=1, le=1000, description="Its place among those losses; 1 is the lowest.")
    cells: int = Field(ge=1, le=1000, description="Number of these losses, the cell's among them.")
    goes_on: bool = Field(description="Whether it is among the best of them, which continue.")


class CellStatus(ObservedModel):
    """One line of the table: a cell and its state."""

    name: str = Field(max_length=63, description="Name of its QLoRAJob.")
    overrides: ShortText = Field(description="Its changes to the template.")
    phase: CellPhase = Field(
        "Pending",
        description="Phase of its QLoRAJob; Pending before it is created, too. Stopped: spec.halving has stopped it; "
        "its QLoRAJob is suspended. Deleted: a user has deleted it before its end, and it is not created again.",
    )
    uid: str = Field("", max_length=64, description="UID of its QLoRAJob; empty before it is created.")
    progress: ShortText = Field("", description="Training steps done.")
    loss: Finite | None = Field(None, description="Training loss in the latest step.")
    eval_loss: Finite | None = Field(None, description="Loss on the held-out rows in the latest evaluation.")
    score: Share | None = Field(None, description="Score of its answers, if the template's gate has one.")
    gpu_seconds: GpuTime = Field(0, alias="gpuHours", description="GPU hours that its train pods have had.")
    lost_gpu_seconds: GpuTime = Field(0, alias="lostGpuHours", description="Of these, those that are in no checkpoint.")
    cost: ShortText | None = Field(None, description="Their cost; not set without a price in the profile.")
    rank: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Its place among the cells that have succeeded, by spec.best; 1 is the best. Not set with select: "
        "all.",
    )
    adapter: Uri = Field("", description="Folder of its adapter.")
    sha256: str = Field("", max_length=64, description="SHA-256 of adapter_model.safetensors.")
    reason: str = Field(
        "", max_length=128, description="Why it has failed, was stopped, or has not started, in one word."
    )
    message: ShortText = Field("", description="Why it was stopped, or has not started, for people.")
    rungs: tuple[RungStatus, ...] | None = Field(
        None,
        max_length=MAX_RUNGS,
        description="Its comparisons at the rungs of spec.halving; not set before the first.",
    )


class BestCell(ObservedModel):
    """The best cell, by spec.best, of those that have succeeded so far."""

    cell: str = Field(max_length=63, description="Name of its QLoRAJob.")
    overrides: ShortText = Field(description="Its changes to the template.")
    eval_loss: Finite | None = Field(
        None,
        description="Loss of its adapter on the held-out rows, with five significant digits; status.cells has more.",
    )
    score: Share | None = Field(None, description="Score of its answers, if the template's gate has one.")
    adapter: Uri = Field(description="Folder of its adapter, which stays when the sweep is deleted.")
    sha256: str = Field("", max_length=64, description="SHA-256 of adapter_model.safetensors.")


class PublishedCell(ObservedModel):
    """The QLoRAJob that publishes the best adapter, with spec.publish: best."""

    name: str = Field(max_length=63, description="Name of the QLoRAJob.")
    cell: str = Field(max_length=63, description="Name of the cell whose run it continues.")
    phase: CellPhase = Field(
        description="Its phase. Deleted: a user has deleted it before its end, or that cell before it had started."
    )
    uid: str = Field(max_length=64, description="Its UID; empty if that cell was deleted before it had started.")
    gpu_seconds: GpuTime = Field(0, alias="gpuHours", description="GPU hours that its train pods have had.")
    lost_gpu_seconds: GpuTime = Field(0, alias="lostGpuHours", description="Of these, those that are in no checkpoint.")
    cost: ShortText | None = Field(None, description="Their cost; not set without a price in the profile.")
    adapter: Uri = Field("", description="Where it has published the adapter.")
    sha256: str = Field("", max_length=64, description="SHA-256 of adapter_model.safetensors there.")
    reason: str = Field("", max_length=128, description="Why it has failed, or has not started, in one word.")
    message: ShortText = Field("", description="Why it has not started, for people.")


class SweepPodStatus(ObservedModel):
    """The cells that one pod trains, and the sweep's Job of that pod."""

    number: int = Field(ge=0, le=63, description="Which pod of spec.cellsPerPod cells it is, counted from 0.")
    cells: tuple[ShortText, ...] = Field(
        (), max_length=MAX_TOGETHER, description="The cells that its train Job trains; empty without one."
    )
    alone: tuple[ShortText, ...] = Field(
        (),
        max_length=MAX_TOGETHER,
        description="The cells that have a separate train step now, and train the rest of their runs alone.",
    )
    waiting: tuple[ShortText, ...] = Field(
        (), max_length=MAX_TOGETHER, description="The cells that its next train Job will train."
    )
    step: StepStatus = Field(description="The train Job.")
    ended: bool = Field(False, description="Whether that Job has ended; a pod of it may still run.")
    pod: str = Field("", max_length=253, description="The pod of it that runs now.")
    pod_uid: str = Field("", max_length=64, description="UID of that pod.")
    reason: str = Field(
        "", max_length=128, description="Why none runs, or the state of the one that does, in one word."
    )
    message: Message = Field("", description="The same for people.")
    failures: Count = Field(0, description="Attempts that failed.")
    disruptions: Count = Field(0, description="Attempts that were interrupted from outside.")
    active_seconds: Count = Field(0, description="Seconds that its pods have run.")
    active_until: Timestamp | None = Field(None, description="Up to when these are counted.")
    last_failure: FailureStatus | None = Field(None, description="Why it failed last.")
    usage: UsageStatus | None = Field(
        None, description="Its pods, and the GPU time of them that counts for no cell: of cells that have ended since."
    )


class SweepUsage(ObservedModel):
    """GPU time of all cells, also deleted ones, and of publishing the best adapter."""

    gpu_seconds: GpuTime = Field(
        alias="gpuHours", description='Hours times GPUs, of all their train pods, for example "12.50".'
    )
    lost_gpu_seconds: GpuTime = Field(
        alias="lostGpuHours", description="Of these, those that are in no checkpoint; each cell reports why."
    )
    cost: ShortText | None = Field(
        None, description="Their cost; not set without a price, or if prices are in several currencies."
    )


class QLoRASweepStatus(ObservedModel):
    """The operator's report about a sweep: a table of its cells, and the best of them."""

    observed_generation: int | None = Field(
        None, ge=-1, le=2**53, description="Generation of the spec that the status is about."
    )
    phase: SweepPhase | None = Field(None, description="Summary of the conditions, for people.")
    conditions: tuple[Condition, ...] = Field(
        (),
        max_length=MAX_CONDITIONS,
        description="Observations by type; `kubectl wait --for=condition=Succeeded` works.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    summary: ShortText = Field("", description='Cells that have ended, of all, for example "3/12".')
    succeeded: Count = Field(0, description="Cells that have succeeded.")
    failed: Count = Field(0, description="Cells that have failed, or were deleted before their end.")
    stopped: Count = Field(0, description="Cells that spec.halving has stopped.")
    running: Count = Field(0, description="Cells that were created and have not ended.")
    pending: Count = Field(0, description="Cells that were not created yet.")
    best: BestCell | None = Field(
        None, description="The best cell so far; not set before one has succeeded, and with select: all."
    )
    published: PublishedCell | None = Field(
        None, description="With spec.publish: best, the job that publishes the best adapter; not set before it exists."
    )
    cells: tuple[CellStatus, ...] = Field(
        (),
        max_length=64,
        description="The cells in their order.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    pods: tuple[SweepPodStatus, ...] = Field(
        (),
        max_length=32,
        description="With spec.cellsPerPod, the pods that train several cells.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number"]},
    )
    usage: SweepUsage | None = Field(None, description="GPU time used and lost; not set before a pod has had a GPU.")
    claim_name: str = Field("", max_length=253, description="The workspace's PersistentVolumeClaim, for all cells.")
    report: Uri | None = Field(
        None,
        description="Page with the curves of the cells over each other, which each cell updates when it succeeds, does "
        "not pass its gate, diverges, or is stopped by spec.halving.",
    )
    start_time: Timestamp | None = Field(None, description="When the operator first saw the sweep.")
    completion_time: Timestamp | None = Field(
        None, description="When the last cell ended, or the cells were found invalid."
    )
    claim_deletion_time: Timestamp | None = Field(
        None,
        description="When the operator deleted the claim that it had created for the cells, by whenFinished of its "
        "retention policy.",
    )
