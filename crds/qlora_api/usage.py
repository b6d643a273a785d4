"""A job's GPU use: the user's budget, and the status' time, cost and forecast."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_api.schema import ApiModel, ObservedModel
from qlora_api.status_types import Count, GpuTime, Message, Share, ShortText, Timestamp

MAX_COUNTED_PODS = 256
"""More than the operator lists of a job with the most nodes (`decisions/usage/usage.py`)."""
LossCause = Literal["startup", "disruption", "failure", "suspension"]
PodEnd = Literal["completed", "disruption", "failure", "suspension"]
GpuHours = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class BudgetSpec(ApiModel):
    """Limit of the job's GPU hours."""

    gpu_hours: GpuHours | None = Field(
        default=None,
        description="GPU hours that the train pods may use in total: one GPU for one hour is 1. Then the job saves a "
        "checkpoint and fails with the reason BudgetExceeded; raise this and set a new retry.request to continue from "
        "there. No limit if not set, except that of the profile.",
    )


class LostGpuTime(ObservedModel):
    """GPU hours that are in no checkpoint, by their cause. Each second counts once."""

    startup: GpuTime = Field(
        0, description="From when a pod had its GPUs until it began to train, or gave up waiting for other nodes."
    )
    disruption: GpuTime = Field(
        0,
        description="Since its last checkpoint, or all of it if it had not begun to train, of a pod that was evicted, "
        "preempted or deleted.",
    )
    failure: GpuTime = Field(0, description="The same of a pod that failed.")
    suspension: GpuTime = Field(
        0, description="The same of a pod whose Job was stopped: by spec.suspend, a queue, or a limit of the job."
    )

    @property
    def total(self) -> int:
        """GPU seconds lost to all causes."""
        return self.startup + self.disruption + self.failure + self.suspension


class TakenOverPart(ObservedModel):
    """The part of a cell that a pod of its sweep trains, once the sweep counts it."""

    uid: str = Field(max_length=64, description="UID of the cell.")
    after_seconds: Count = Field(description="Seconds of the pod after which the cell's part counts for the sweep.")


class PodUsage(ObservedModel):
    """A train pod, and for how long it had its GPUs."""

    name: str = Field("", max_length=253, description="Its name.")
    uid: str = Field(max_length=64, description="Its UID.")
    created: Timestamp = Field(description="When it was created.")
    since: Timestamp = Field(description="When it got its node, and with it its GPUs.")
    jobs: int = Field(1, ge=1, le=1000, description="Jobs that it trains, which share its time evenly.")
    trained: tuple[ShortText, ...] | None = Field(
        None, max_length=1000, description="UIDs of these jobs; only of a pod of a sweep, in the status of the sweep."
    )
    taken_over: tuple[TakenOverPart, ...] | None = Field(
        None,
        max_length=1000,
        description="Of these jobs, those that were deleted or had ended while it went on. Their parts of its further "
        "time count for the sweep.",
    )
    seconds: Count = Field(0, description="Seconds that it has had its GPUs, up to when they were last counted.")
    trained_since: Timestamp | None = Field(None, description="When it began to train; not set before, or if unknown.")
    from_step: Count | None = Field(None, description="Optimizer steps that were done when it was first seen to train.")
    startup_seconds: Count = Field(0, description="Of these seconds, those before it began to train.")
    lost_seconds: Count = Field(0, description="Of these seconds, those that the way it ended has undone.")
    end: PodEnd | None = Field(None, description="How it ended; not set while it runs.")


class UsageStatus(ObservedModel):
    """GPU time of the job's train pods, from when each got its node until it ended.

    While a pod runs, its time is brought up to date with each report of progress, and every five minutes without.
    """

    gpu_seconds: GpuTime = Field(
        0,
        alias="gpuHours",
        description='Hours times GPUs, of all train pods, for example "12.50"; exact to a second. Never decreases.',
    )
    settled_gpu_seconds: GpuTime | None = Field(
        None,
        alias="settledGpuHours",
        description="The part of gpuHours that is in the profile's sums for good; set when the job has ended.",
    )
    lost_gpu_seconds: LostGpuTime = Field(
        LostGpuTime(), alias="lostGpuHours", description="The part of gpuHours that is in no checkpoint, by cause."
    )
    cost: ShortText | None = Field(
        None,
        description='Cost of gpuHours at the profile\'s price, for example "31.25 EUR"; not set without a price.',
    )
    pods: tuple[PodUsage, ...] = Field(
        (),
        max_length=MAX_COUNTED_PODS,
        description="The latest train pods, oldest first. Earlier ones are in the sums.",
    )
    counted_until: Timestamp | None = Field(
        None, description="When the last pod was created that is in the sums and no longer listed."
    )
    ended_until: Timestamp | None = Field(
        None, description="When the last of the pods that are in the sums and no longer listed had ended."
    )


class WorkStatus(ObservedModel):
    """The amount of computation, as prepare counts it."""

    parameters: Count = Field(description="Weights that each token is multiplied by.")
    tokens: Count = Field(description="Tokens of the whole run, without padding.")
    flops: float = Field(ge=0, le=1e30, allow_inf_nan=False, description="Floating-point operations of the run.")


class ForecastStatus(ObservedModel):
    """GPU hours that the whole job is expected to take, with what it has used already."""

    gpu_hours: ShortText = Field(description='Expected GPU hours, for example "12.50".')
    basis: Literal["Flops", "Measured"] = Field(
        description="Basis of the forecast: the operations of the run and the GPU's speed (profile gpuTflops), "
        "before training; or the speed of the run's optimizer steps, from its tenth on."
    )
    utilization: Share | None = Field(
        None, description="With basis Flops: the share of the GPU's speed that was assumed to be reached."
    )
    cost: ShortText | None = Field(None, description="Cost of these at the profile's price; not set without one.")
    within_budget: bool | None = Field(
        None, description="Whether these are within spec.budget and the profile's limit; not set without both."
    )
    message: Message = Field("", description="If they are not: the budget, what happens then, and what to do.")
