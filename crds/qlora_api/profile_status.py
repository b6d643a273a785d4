"""The status of a QLoRAProfile: what the operator reports."""

from typing import Annotated

from pydantic import Field

from qlora_api.kubernetes_values import GpuMemory
from qlora_api.schema import ObservedModel
from qlora_api.status import MAX_CONDITIONS, Condition
from qlora_api.status_types import Count, GpuTime

MAX_UNSETTLED = 10_000
"""Jobs of one namespace that have begun and not ended for long. 10,000 of them take half a megabyte."""
Uid = Annotated[str, Field(max_length=64)]


class UsageOfMonth(ObservedModel):
    """The GPU time of a namespace in one month."""

    month: str = Field(max_length=7, description="The month in UTC, for example 2026-12.")
    gpu_seconds: GpuTime = Field(
        alias="gpuHours",
        description='Hours times GPUs, for example "12.50". A second counts for the month that it is counted in.',
    )


class NamespaceUsage(ObservedModel):
    """The GPU time that jobs of one namespace have used with the profile."""

    namespace: str = Field(max_length=63, description="The namespace.")
    months: tuple[UsageOfMonth, ...] = Field(
        (),
        max_length=2,
        description="This month and the one before, as far as something was used; also by jobs that were deleted.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["month"]},
    )
    unsettled: dict[Uid, GpuTime] = Field(
        {},
        max_length=MAX_UNSETTLED,
        description="GPU hours of single jobs and sweeps that the sums include, by UID, until they have ended.",
    )


class QLoRAProfileStatus(ObservedModel):
    """The operator's report about a profile."""

    observed_generation: int | None = Field(
        None, ge=-1, le=2**53, description="Generation of the spec that the status is about."
    )
    conditions: tuple[Condition, ...] = Field(
        (),
        max_length=MAX_CONDITIONS,
        description="Observations by type. Ready: whether jobs can start with the profile.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    running_jobs: Count = Field(0, description="Jobs with a step at work.")
    waiting_jobs: Count = Field(0, description="Jobs that wait to start, in a queue, or for the profile.")
    gpu_memory: GpuMemory | None = Field(
        None,
        description="Memory of each GPU by the labels of the profile's nodes, for jobs that set none; not set if "
        "spec.gpuMemory is, or if the labels are missing or differ.",
    )
    namespaces: tuple[NamespaceUsage, ...] = Field(
        (),
        max_length=5000,
        description="GPU time by namespace.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["namespace"]},
    )
