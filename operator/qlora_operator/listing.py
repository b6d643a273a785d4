"""What a list of the API server is and says, for those that ask for it and those that read it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL
from qlora_operator.decisions.observe import Object
from qlora_operator.workqueue import Key

Kind = Literal["qlorajobs", "jobs", "pods"]
KINDS: tuple[Kind, ...] = ("qlorajobs", "jobs", "pods")

# What is asked for at a time. Parsed, a Job or pod takes about 40 KiB, and two megabytes if a tenant wants that.
OBJECTS_PER_PAGE = 25


class Listing(NamedTuple):
    """A complete list, and the version that it was taken at."""

    items: Sequence[Object]
    version: str


class Listed(NamedTuple):
    """One object of a list: that it is there, and in which version."""

    namespace: str
    name: str
    uid: str
    version: str
    job_uid: str
    """UID of the QLoRAJob that it is, or whose label it has."""
    job_name: str

    @property
    def key(self) -> Key:
        """The QLoRAJob that it is, or whose label it has."""
        return self.namespace, self.job_name


def version_number(version: str) -> int:
    """A resourceVersion as a number, which grows with each write; -1 if it is none."""
    return int(version) if version.isdecimal() else -1


def listed(kind: Kind, body: Object) -> Listed:
    """What is kept of an object."""
    metadata = body["metadata"]
    name, uid = metadata["name"], metadata["uid"]
    labels = metadata.get("labels") or {}
    job = (uid, name) if kind == "qlorajobs" else (labels.get(JOB_UID_LABEL, ""), labels.get(JOB_LABEL, ""))
    return Listed(metadata["namespace"], name, uid, metadata["resourceVersion"], *job)
