"""What the watches have shown: every QLoRAJob with its Jobs and pods, so that a pass need not ask for them again.

The store is late, never wrong about the past: only a newer version of an object replaces the one that is held, whatever
order watches and answers arrive in. What it must not be trusted with is read live: see `Held` and `Store.held`.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_api.naming import JOB_UID_LABEL
from qlora_operator.decisions.observe import (
    ChildJob,
    Object,
    Observed,
    Pod,
    collect,
    controller_uid,
    observe,
    parse_child,
    parse_pod,
)
from qlora_operator.listing import Kind, Listed, Listing, version_number
from qlora_operator.workqueue import Key

_MAX_BURIED = 4096
_WORTH_PACKING = 2048
# The fastest. The others take longer and gain little.
_COMPRESSION = 1
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

_Place = tuple[str, str]
"""Namespace and UID of a QLoRAJob: anybody can give any label to a pod of another namespace."""


@dataclass(frozen=True, slots=True)
class Held:
    """One QLoRAJob as it was shown, and its children."""

    body: dict[str, Any]
    observed: Observed
    fresh: bool
    """Whether a watch has shown its creation: nothing can exist of it that was created before."""


@dataclass(slots=True)
class _Child:
    version: int
    value: ChildJob | Pod | None
    """None for a Job that has the label of a QLoRAJob that does not control it."""


@dataclass(slots=True)
class _Entry:
    uid: str
    key: Key | None = None
    version: int = 0
    body: bytes = b""
    marks: bytes = b""
    resolved_stored: bool = False
    fresh: bool = False
    distrusted: bool = False
    settled: bool = False
    wanted: dict[str, int] = field(default_factory=dict)
    children: dict[Kind, dict[str, _Child]] = field(default_factory=lambda: {"jobs": {}, "pods": {}})
    lost: ChildJob | None = None

    def version_of(self, uid: str) -> int:
        """Version in which the job, or a child of it, is held; 0 if it is not."""
        if uid == self.uid:
            return self.version
        return next((children[uid].version for children in self.children.values() if uid in children), 0)

    @property
    def empty(self) -> bool:
        return not self.body and not any(self.children.values())


class Store:
    """QLoRAJobs by UID, each with its children, as the watches, lists and answers have shown them."""

    def __init__(self) -> None:
        self._entries: dict[_Place, _Entry] = {}
        self._places: dict[Key, _Place] = {}
        self._buried: dict[str, int] = {}
        self._ordered = True

    def held(self, key: Key) -> Held | None:
        """The job as held; None if it has to be read live.

        That is: it is not held, a list or a failed write has shown that something newer exists, or the API server's
        versions are no numbers, so that nobody can say which of two is newer.
        """
        entry = self._entry(key)
        if entry is None or entry.distrusted or not self._ordered or self._lags(entry):
            return None
        observed = collect(
            (child.value for child in entry.children["jobs"].values() if isinstance(child.value, ChildJob)),
            (child.value for child in entry.children["pods"].values() if isinstance(child.value, Pod)),
            entry.lost,
        )
        return Held(json.loads(_unpacked(entry.body)), observed, entry.fresh)

    def job_changed(self, body: Object, *, deleted: bool = False, created: bool = False) -> bool:
        """Note a QLoRAJob. Whether that is worth a pass: not if it is known, or if only its status is another.

        `created`: a watch, and no list, has shown its creation.
        """
        metadata = body["metadata"]
        key, place = (metadata["namespace"], metadata["name"]), (metadata["namespace"], metadata["uid"])
        version = self._version(metadata)
        if deleted:
            self._bury(metadata["uid"], version)
            self._drop_job(place)
            return True
        if self._is_buried(metadata["uid"], version):
            return False
        entry = self._entries.setdefault(place, _Entry(place[1]))
        if version <= entry.version and self._ordered:
            return False
        marks = _marks(metadata)
        news = entry.marks != marks
        entry.fresh = entry.fresh or (created and entry.empty)
        entry.key, entry.version, entry.marks, entry.body = key, version, marks, _compact(body)
        entry.settled = entry.settled and not news
        if (body.get("status") or {}).get("resolved"):
            self._forget_resolved(entry)
        self._take_place(key, place)
        return news

    def child_changed(self, kind: Kind, body: Object, *, deleted: bool = False) -> bool:
        """Note a Job or a pod. Whether that is worth a pass: not if nothing has changed that decisions depend on."""
        metadata = body["metadata"]
        uid, job_uid = metadata["uid"], (metadata.get("labels") or {}).get(JOB_UID_LABEL, "")
        version, place = self._version(metadata), (metadata["namespace"], job_uid)
        if deleted:
            self._bury(uid, version)
            return self._drop_child(place, kind, uid, _parse(kind, body, job_uid))
        if self._is_buried(uid, version):
            return False
        entry = self._entries.setdefault(place, _Entry(place[1]))
        before = entry.children[kind].get(uid)
        if before is not None and version <= before.version and self._ordered:
            return False
        value = _parse(kind, body, job_uid)
        if entry.resolved_stored and isinstance(value, ChildJob) and value.resolved:
            value = replace(value, resolved="")
        entry.children[kind][uid] = _Child(version, value)
        news = before is None or before.value != value
        entry.settled = entry.settled and not news
        return news

    def read(self, body: Object, jobs: Listing, pods: Listing) -> Observed:
        """Note what has been read live: the job, and complete lists of its children with their versions."""
        metadata = body["metadata"]
        place = (metadata["namespace"], metadata["uid"])
        self.job_changed(body)
        kinds: tuple[tuple[Kind, Listing], ...] = (("jobs", jobs), ("pods", pods))
        for kind, (bodies, version) in kinds:
            for child in bodies:
                self.child_changed(kind, child)
            self._prune_children(place, kind, {child["metadata"]["uid"] for child in bodies}, version_number(version))
        entry = self._entries.get(place)
        if entry is not None:
            entry.distrusted = False
            # A list may have shown more since these were taken.
            taken = min(version_number(jobs.version), version_number(pods.version))
            entry.wanted = {
                uid: version for uid, version in entry.wanted.items() if uid == entry.uid or version > taken
            }
        return replace(observe(place[1], jobs.items, pods.items), lost=entry.lost if entry else None)

    def compare(self, kind: Kind, namespace: str | None, found: list[Listed], version: str) -> set[Key]:
        """Note a complete list, taken at `version`: the jobs of which it shows more, or less, than is held.

        What is held and not in the list has been deleted, unless it is newer than the list. What is in it in a newer
        version than is held, the watch may show any moment, or never: until then the job is read live.
        """
        changed: set[Key] = set()
        for each in found:
            entry = self._entries.get((each.namespace, each.job_uid))
            number = self._number(each.version)
            if self._is_buried(each.uid, number):
                continue
            if entry is not None and entry.key is not None:
                if entry.version_of(each.uid) < number:
                    entry.wanted[each.uid] = number
                    entry.settled = False
                    changed.add(entry.key)
            elif each.job_name:
                changed.add(each.key)
        return changed | self._prune(kind, namespace, {each.uid for each in found}, self._number(version))

    def distrust(self, key: Key) -> None:
        """Have the job read live the next time: a write has failed, perhaps because something newer exists."""
        if entry := self._entry(key):
            entry.distrusted = True

    def distrust_all(self) -> list[Key]:
        """Have every job read live the next time, unless nothing is left to do for it. Returns those jobs."""
        doubted = [entry for entry in self._entries.values() if entry.key is not None and not entry.settled]
        for entry in doubted:
            entry.distrusted = True
        return [entry.key for entry in doubted if entry.key is not None]

    def gone(self, key: Key) -> None:
        """Note that the job does not exist."""
        if place := self._places.get(key):
            self._bury(place[1], self._entries[place].version)
            self._drop_job(place)

    def settle(self, key: Key, settled: bool) -> None:
        """Note at the end of a pass whether nothing is left to do for the job, until something is shown about it."""
        if entry := self._entry(key):
            entry.settled = settled

    def is_settled(self, key: Key) -> bool:
        """Whether nothing is left to do for the job."""
        entry = self._entry(key)
        return entry is not None and entry.settled

    def _entry(self, key: Key) -> _Entry | None:
        place = self._places.get(key)
        return self._entries[place] if place else None

    def _lags(self, entry: _Entry) -> bool:
        """Whether a list has shown something newer; forgets what has been shown since."""
        for uid, version in list(entry.wanted.items()):
            if max(entry.version_of(uid), self._buried.get(uid, 0)) >= version:
                del entry.wanted[uid]
        return bool(entry.wanted)

    def _take_place(self, key: Key, place: _Place) -> None:
        """The name now belongs to this job: of two with one name, the newer version is the one that exists."""
        before = self._places.get(key)
        if before is None or before == place or self._entries[before].version < self._entries[place].version:
            self._places[key] = place

    def _prune(self, kind: Kind, namespace: str | None, found: set[str], version: int) -> set[Key]:
        pruned: set[Key] = set()
        for place, entry in list(self._entries.items()):
            if namespace not in (None, place[0]):
                continue
            key = entry.key
            if kind != "qlorajobs":
                gone = self._prune_children(place, kind, found, version)
            elif gone := bool(entry.body) and place[1] not in found and entry.version <= version:
                self._bury(place[1], version)
                self._drop_job(place)
            if gone and key is not None:
                pruned.add(key)
        return pruned

    def _prune_children(self, place: _Place, kind: Kind, found: set[str], version: int) -> bool:
        entry = self._entries.get(place)
        if entry is None:
            return False
        gone = [uid for uid, child in entry.children[kind].items() if uid not in found and child.version <= version]
        for uid in gone:
            self._bury(uid, version)
            self._drop_child(place, kind, uid, None)
        return bool(gone)

    def _drop_job(self, place: _Place) -> None:
        entry = self._entries.get(place)
        if entry is None:
            return
        if entry.key is not None and self._places.get(entry.key) == place:
            del self._places[entry.key]
        entry.key, entry.body, entry.marks = None, b"", b""
        if entry.empty:
            del self._entries[place]

    def _drop_child(self, place: _Place, kind: Kind, uid: str, shown: ChildJob | Pod | None) -> bool:
        """Forget a child; `shown`: as its deletion has shown it. Keeps the first Job of a job that has stored nothing.

        What was resolved stands on that Job alone: the step goes on with the next attempt, and not as if it were new.
        """
        entry = self._entries.get(place)
        if entry is None:
            return False
        child = entry.children[kind].pop(uid, None)
        value = shown or (child.value if child else None)
        if isinstance(value, ChildJob) and value.resolved and entry.body and not entry.resolved_stored:
            entry.lost = value
        entry.settled = False
        if entry.empty:
            del self._entries[place]
        return True

    @staticmethod
    def _forget_resolved(entry: _Entry) -> None:
        """The status has what was resolved: no Job need keep it."""
        entry.resolved_stored, entry.lost = True, None
        for child in entry.children["jobs"].values():
            if isinstance(child.value, ChildJob) and child.value.resolved:
                child.value = replace(child.value, resolved="")

    def _bury(self, uid: str, version: int) -> None:
        """Remember that this object is deleted: an older view of it may still arrive, as the answer of its creation."""
        self._buried[uid] = max(version, self._buried.pop(uid, version))
        while len(self._buried) > _MAX_BURIED:
            del self._buried[next(iter(self._buried))]

    def _is_buried(self, uid: str, version: int) -> bool:
        return uid in self._buried and version <= self._buried[uid]

    def _version(self, metadata: Object) -> int:
        return self._number(str(metadata.get("resourceVersion", "")))

    def _number(self, version: str) -> int:
        number = version_number(version)
        self._ordered = self._ordered and number >= 0
        return number


def _parse(kind: Kind, body: Object, job_uid: str) -> ChildJob | Pod | None:
    if kind == "pods":
        return parse_pod(body)
    return parse_child(body) if controller_uid(body) == job_uid else None


def _marks(metadata: Object) -> bytes:
    """What tells a change that matters from a write of the status."""
    fields = ("generation", "deletionTimestamp", "labels", "annotations")
    text = json.dumps([metadata.get(name) for name in fields], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _compact(body: Object) -> bytes:
    """The job without what nobody here reads: half of it is notes of the API server and of kubectl."""
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    if annotations := metadata.get("annotations"):
        metadata["annotations"] = {name: value for name, value in annotations.items() if name != _LAST_APPLIED}
    return _packed(json.dumps({**body, "metadata": metadata}, separators=(",", ":")).encode())


def _packed(data: bytes) -> bytes:
    """Compressed to a third, unless there is little to gain, as for a job that has no status yet."""
    return data if len(data) < _WORTH_PACKING else zlib.compress(data, _COMPRESSION)


def _unpacked(data: bytes) -> bytes:
    return data if data.startswith(b"{") else zlib.decompress(data)
