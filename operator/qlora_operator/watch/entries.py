"""The entries of the store: one QLoRAJob each, with its children."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from qlora_operator.decisions.observed.objects import ChildJob, Pod
from qlora_operator.keys import Key
from qlora_operator.kube.listing import ChildKind

JobId = tuple[str, str]
"""Namespace and UID of a QLoRAJob: a tenant can give any label to a pod of another namespace."""


@dataclass(slots=True)
class Child:
    """A Job or a pod, as held."""

    version: int
    value: ChildJob | Pod | None
    """None for a Job that has the label of a QLoRAJob that does not control it."""


@dataclass(slots=True)
class Entry:
    """A QLoRAJob, which may not be known yet, and its children."""

    job_id: JobId
    key: Key | None = None
    version: int = 0
    body: bytes = b""
    marks: bytes = b""
    is_new: bool = True
    """Whether no pass has written its status: a job that waits for a place has one."""
    has_started: bool = False
    revision: bytes = b""
    fresh: bool = False
    distrusted: bool = False
    settled: bool = False
    ended: bool = False
    wanted: dict[str, int] = field(default_factory=dict)
    children: dict[ChildKind, dict[str, Child]] = field(default_factory=lambda: {"jobs": {}, "pods": {}})
    last_words: dict[str, Pod] = field(default_factory=dict)
    """Pods that are gone, as they ended, by their UID: until a pass has decided."""

    def version_of(self, uid: str) -> int:
        """Return the held version of the job, or of its child, or 0 without one."""
        if uid == self.job_id[1]:
            return self.version
        child = next((children[uid] for children in self.children.values() if uid in children), None)
        return 0 if child is None else child.version

    @property
    def empty(self) -> bool:
        """Whether it has neither a job nor children."""
        return not self.body and not any(self.children.values())

    def keep_last_words(self, value: ChildJob | Pod | None) -> None:
        """Keep how a pod that is gone has ended."""
        if isinstance(value, Pod) and value.ended and self.key is not None:
            self.last_words[value.uid] = value

    def counted_last_words(self, counted: Iterable[str]) -> list[str]:
        """Return those of counted pods, but not of one that counts with the end of its Job, which follows."""
        jobs = (child.value for child in self.children["jobs"].values())
        unfinished = {job.uid for job in jobs if isinstance(job, ChildJob) and not job.finished}
        found = ((uid, self.last_words[uid]) for uid in self.last_words.keys() & set(counted))
        return [uid for uid, pod in found if not (pod.decisive and pod.owner_uid in unfinished)]


class Entries:
    """All entries, by namespace: of many, a list of one namespace concerns few."""

    def __init__(self) -> None:
        self._namespaces: dict[str, dict[JobId, Entry]] = {}

    def find(self, job_id: JobId) -> Entry | None:
        """Return the entry of the job, or None if there is none."""
        return self._namespaces.get(job_id[0], {}).get(job_id)

    def enter(self, job_id: JobId) -> Entry:
        """Return the entry of the job, a new one if there is none."""
        return self._namespaces.setdefault(job_id[0], {}).setdefault(job_id, Entry(job_id))

    def remove(self, job_id: JobId) -> None:
        """Remove the entry of the job."""
        entries = self._namespaces[job_id[0]]
        del entries[job_id]
        if not entries:
            del self._namespaces[job_id[0]]

    def of(self, namespace: str | None) -> list[Entry]:
        """Return the entries of the namespace, or of all (None)."""
        namespaces = self._namespaces.values() if namespace is None else [self._namespaces.get(namespace, {})]
        return [entry for entries in namespaces for entry in entries.values()]
