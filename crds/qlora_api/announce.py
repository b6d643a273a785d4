"""Where a finished adapter is announced to whatever loads it into servers: `spec.output.announce`."""

from pydantic import Field

from qlora_api.profile import ObjectName
from qlora_api.schema import ApiModel

ANNOUNCEMENTS_LABEL = "qlora.dev/announcements"
"""Label, with the value `true`, of a ConfigMap that the operator may write entries to."""


class AnnounceSpec(ApiModel):
    """A ConfigMap of this namespace that lists finished adapters."""

    config_map: ObjectName = Field(
        description="Name of the ConfigMap, which several jobs may share. It is created if there is none; one that "
        'exists must have the label qlora.dev/announcements: "true". The operator adds the key JOB.json, once, after '
        "success, and never removes it. The condition Announced reports it.",
    )


def entry_key(job: str) -> str:
    """The key of a job's entry, which is the name of its file where the ConfigMap is mounted."""
    return f"{job}.json"
