"""When finished jobs and sweeps, and the claims created for them, are deleted."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_api.schema import ApiModel

TtlSeconds = Annotated[int, Field(ge=0, le=2**31 - 1)]


class ClaimRetentionPolicy(ApiModel):
    """When the operator's claim is deleted, as a StatefulSet's field of that name has it."""

    when_deleted: Literal["Retain", "Delete"] | None = Field(
        default=None,
        description="When the job is deleted, or the sweep: keep the claim (Retain), or delete it with them (Delete).",
    )
    when_finished: Literal["Retain", "Delete"] | None = Field(
        default=None,
        description="Once the job or the sweep has succeeded: keep the claim (Retain), or delete it (Delete), which "
        "Kubernetes delays until no pod uses it. One that has failed keeps it, for a retry.",
    )
