"""Holds every QLoRAJob with its Jobs and pods, as the watches have shown them.

A pass so needs no further reads. The store is late, never wrong about the past: only a newer version of an object
replaces the one that is held, whatever order watches and answers arrive in. Decisions that need more than that use a
live read: see `Held` and `Store.held`.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_operator.decisions.observed.objects import ChildJob, Object, Observed, Pod, collect
from qlora_operator.keys import Key
from qlora_operator.kube.listing import (
    ChildKind,
    ChildList,
    ChildView,
    Kind,
    ObjectVersion,
    child_view,
    compact,
    version_number,
)
from qlora_operator.watch.entries import Child, Entries, Entry, JobId
from qlora_operator.watch.job_index import JobIndex
from qlora_operator.watch.sweep_index import SweepIndex

logger = logging.getLogger(__name__)

_MAX_BURIED = 4096
# A standby makes no passes, and so counts none of them.
_MAX_LAST_WORDS = 4096
_WORTH_PACKING = 2048
# The fastest. The others take longer and gain little.
_COMPRESSION = 1


@dataclass(frozen=True, slots=True)
class Held:
    """One QLoRAJob as it was shown, and its children."""

    body: dict[str, Any]
    observed: Observed
    fresh: bool
    """Whether a watch has shown its creation: no older objects of it exist."""


class Store:
    """QLoRAJobs by UID, each with its children, from watches, lists and answers."""

    def __init__(self) -> None:
        self._entries = Entries()
        self._ids: dict[Key, JobId] = {}
        self._homes: dict[str, Entry] = {}
        """The entry of each child, by its UID: a user who may change it can give it the label of another job."""
        self.sweeps, self.jobs = SweepIndex(), JobIndex()
        self._buried: dict[str, int] = {}
        self._kept: dict[str, JobId] = {}
        """The jobs of the pods whose last words are kept, by the pods' UIDs, the oldest first."""
        self._ordered = True

    def held(self, key: Key) -> Held | None:
        """Return the job as held, or None if it has to be read live.

        That is: it is not held, a list or a failed write has shown a newer object, or the API server's versions are no
        numbers, so that they have no order.
        """
        entry = self._entry(key)
        if entry is None or entry.distrusted or not self._ordered or self._lags(entry):
            return None
        observed = _observed(entry.children["jobs"].values(), entry.children["pods"].values(), entry)
        return Held(json.loads(_unpacked(entry.body)), observed, entry.fresh)

    def job_changed(self, body: Object, *, deleted: bool = False, created: bool = False) -> bool:
        """Note a QLoRAJob and return whether that is worth a pass.

        It is not for a known version, or if only its status differs, unless that was lost. `created`: a watch, and no
        list, has shown its creation.
        """
        metadata = body["metadata"]
        key, job_id = (metadata["namespace"], metadata["name"]), (metadata["namespace"], metadata["uid"])
        version = self._version(metadata)
        if deleted:
            self.jobs.note(body, deleted=True)
            self._bury(metadata["uid"], version)
            self._drop_job(job_id)
            return True
        if self._is_buried(metadata["uid"], version):
            return False
        entry = self._entries.enter(job_id)
        if version <= entry.version and self._ordered:
            return False
        self.jobs.note(body)
        kept = compact(body)
        marks, has_started = _marks(kept["metadata"]), "currentRevision" in (body.get("status") or {})
        news = entry.marks != marks or (entry.has_started and not has_started)
        entry.fresh = entry.fresh or (created and entry.empty)
        entry.key, entry.version, entry.marks, entry.has_started = key, version, marks, has_started
        entry.is_new = "startTime" not in (body.get("status") or {})
        entry.body = _packed(json.dumps(kept, separators=(",", ":")).encode())
        entry.settled, entry.ended = entry.settled and not news, _has_ended(body)
        self._take_name(key, entry)
        return news

    def child_changed(self, kind: ChildKind, body: Object, *, deleted: bool = False) -> set[Key]:
        """Note a Job or a pod and return the jobs whose decisions depend on the change.

        If the object has got the label of another job, that is also the one that has lost it.
        """
        child = child_view(kind, body)
        return self._child_deleted(kind, child) if deleted else self._child_shown(kind, child)

    def _child_deleted(self, kind: ChildKind, child: ChildView) -> set[Key]:
        self._bury(child.uid, self._number(child.version))
        entry = self._homes.get(child.uid) or self._entries.find((child.namespace, child.job_uid))
        if entry is None:
            return set()
        self._drop_child(entry, kind, child.uid, child)
        return _jobs(entry, child.job_name)

    def _child_shown(self, kind: ChildKind, child: ChildView) -> set[Key]:
        uid, version = child.uid, self._number(child.version)
        job_id, home = (child.namespace, child.job_uid), self._homes.get(uid)
        before = home.children[kind].get(uid) if home else None
        if self._is_buried(uid, version) or (home and version <= home.version_of(uid) and self._ordered):
            return set()
        changed: set[Key] = set()
        if home is not None and home.job_id != job_id:
            self._drop_child(home, kind, uid)
            changed, before = _jobs(home), None
        _report_unreadable(kind, child, before)
        entry = self._entries.enter(job_id)
        entry.children[kind][uid], self._homes[uid] = Child(version, child.value), entry
        if before is None or before.value != child.value:
            entry.settled = False
            changed |= _jobs(entry, child.job_name)
        return changed

    def note_live_read(self, body: Object, jobs: ChildList, pods: ChildList) -> Observed:
        """Note what has been read live, the job and all of its children, and return these."""
        metadata = body["metadata"]
        job_id = (metadata["namespace"], metadata["uid"])
        self.job_changed(body)
        kinds: tuple[tuple[ChildKind, ChildList], ...] = (("jobs", jobs), ("pods", pods))
        for kind, (children, version) in kinds:
            for child in children:
                self._child_shown(kind, child)
            self._prune_children(job_id, kind, {child.uid for child in children}, version_number(version))
        entry = self._entries.find(job_id)
        if entry is not None:
            entry.distrusted = False
            # A list may have shown more since these were taken.
            taken = min(version_number(jobs.version), version_number(pods.version))
            entry.wanted = {
                uid: version for uid, version in entry.wanted.items() if uid == job_id[1] or version > taken
            }
        return _observed(jobs.items, pods.items, entry)

    def compare(self, kind: Kind, namespace: str | None, found: list[ObjectVersion], version: str) -> set[Key]:
        """Note a complete list, taken at `version`, and return jobs that differ from it.

        A held object that is not in the list has been deleted, unless it is newer than the list. An object with a newer
        version than the held one may reach the watch any moment, or never: until then the job is read live.
        """
        changed: set[Key] = set()
        for each in found:
            job_id, home = (each.namespace, each.job_uid), self._homes.get(each.uid)
            number = self._number(each.version)
            if self._is_buried(each.uid, number):
                continue
            if (
                kind != "qlorajobs"
                and home is not None
                and home.job_id != job_id
                and home.version_of(each.uid) < number
            ):
                self._drop_child(home, kind, each.uid)
                changed |= _jobs(home)
            entry = self._entries.find(job_id)
            if entry is not None and entry.key is not None:
                if entry.version_of(each.uid) < number:
                    entry.wanted[each.uid] = number
                    entry.settled = False
                    changed.add(entry.key)
            elif each.job_name:
                changed.add(each.key)
        return changed | self._prune(kind, namespace, {each.uid for each in found}, self._number(version))

    def distrust(self, key: Key) -> None:
        """Have the job read live next time, after a failed write."""
        if entry := self._entry(key):
            entry.distrusted = True

    def distrust_all(self) -> list[Key]:
        """Have every unsettled job read live next time and return those jobs."""
        doubted = [entry for entry in self._entries.of(None) if entry.key is not None and not entry.settled]
        for entry in doubted:
            entry.distrusted = True
        return [entry.key for entry in doubted if entry.key is not None]

    def gone(self, key: Key) -> None:
        """Note that the job does not exist."""
        if entry := self._entry(key):
            self._bury(entry.job_id[1], entry.version)
            self._drop_job(entry.job_id)

    def keys(self) -> tuple[list[Key], list[Key], list[Key]]:
        """Return the jobs without a status, the others that have not ended, and those that have."""
        new, known, ended = list[Key](), list[Key](), list[Key]()
        for job_id in self._ids.values():
            entry = self._entries.find(job_id)
            if entry is not None and entry.key is not None:
                (ended if entry.ended else new if entry.is_new else known).append(entry.key)
        return new, known, ended

    def settle(self, key: Key, settled: bool) -> None:
        """Note, before a decision, whether the job needs nothing until its next event."""
        if entry := self._entry(key):
            entry.settled = settled
            if settled:
                self._drop_words(entry, entry.last_words)

    def note_revision(self, job_id: JobId, body: Object) -> None:
        """Keep the ControllerRevision of a job that is held, in place of another one."""
        if entry := self._entries.find(job_id):
            entry.revision = _packed(json.dumps(body, separators=(",", ":")).encode())

    def revision(self, job_id: JobId) -> Object | None:
        """Return the kept ControllerRevision of the job, which never changes, or None."""
        entry = self._entries.find(job_id)
        return json.loads(_unpacked(entry.revision)) if entry is not None and entry.revision else None

    def decided(self, key: Key, observed: Observed) -> None:
        """Note that a decision from these children is stored, and need not be made again."""
        if entry := self._entry(key):
            self._drop_words(entry, entry.counted_last_words(pod.uid for pod in observed.pods if pod.ended))

    def is_settled(self, key: Key) -> bool:
        """Whether nothing is left to do for the job."""
        entry = self._entry(key)
        return entry is not None and entry.settled

    def _entry(self, key: Key) -> Entry | None:
        job_id = self._ids.get(key)
        return self._entries.find(job_id) if job_id else None

    def _lags(self, entry: Entry) -> bool:
        """Drop the versions shown since, and return whether a list has shown a newer one."""
        for uid, version in list(entry.wanted.items()):
            if max(entry.version_of(uid), self._buried.get(uid, 0)) >= version:
                del entry.wanted[uid]
        return bool(entry.wanted)

    def _take_name(self, key: Key, entry: Entry) -> None:
        """Give the name to this job: of two, the newer version is the one that exists."""
        named = self._entry(key)
        if named is None or named.version < entry.version:
            self._ids[key] = entry.job_id

    def _prune(self, kind: Kind, namespace: str | None, found: set[str], version: int) -> set[Key]:
        pruned: set[Key] = set()
        for entry in self._entries.of(namespace):
            job_id, key = entry.job_id, entry.key
            if kind != "qlorajobs":
                gone = self._prune_children(job_id, kind, found, version)
            elif gone := bool(entry.body) and job_id[1] not in found and entry.version <= version:
                self._bury(job_id[1], version)
                self._drop_job(job_id)
            if gone and key is not None:
                pruned.add(key)
        return pruned

    def _prune_children(self, job_id: JobId, kind: ChildKind, found: set[str], version: int) -> bool:
        entry = self._entries.find(job_id)
        if entry is None:
            return False
        gone = [uid for uid, child in entry.children[kind].items() if uid not in found and child.version <= version]
        for uid in gone:
            self._bury(uid, version)
            self._drop_child(entry, kind, uid)
        return bool(gone)

    def _drop_job(self, job_id: JobId) -> None:
        entry = self._entries.find(job_id)
        if entry is None:
            return
        if entry.key is not None and self._ids.get(entry.key) == job_id:
            del self._ids[entry.key]
        entry.key, entry.body, entry.marks, entry.revision = None, b"", b"", b""
        self._drop_words(entry, entry.last_words)
        self.jobs.drop(job_id[1])
        if entry.empty:
            self._entries.remove(job_id)

    def _drop_child(self, entry: Entry, kind: ChildKind, uid: str, shown: ChildView | None = None) -> None:
        """Drop a child, but keep its last words. `shown`: as its deletion has shown it."""
        child = entry.children[kind].pop(uid, None)
        self._homes.pop(uid, None)
        value = child.value if child else None
        if shown is not None and shown.value is not None:
            value = shown.value
        entry.keep_last_words(value)
        if uid in entry.last_words:
            self._kept[uid] = entry.job_id
            self._drop_oldest_words()
        entry.settled = False
        if entry.empty:
            self._entries.remove(entry.job_id)

    def _drop_words(self, entry: Entry, uids: Iterable[str]) -> None:
        for uid in tuple(uids):
            del entry.last_words[uid]
            self._kept.pop(uid, None)

    def _drop_oldest_words(self) -> None:
        while len(self._kept) > _MAX_LAST_WORDS:
            uid = next(iter(self._kept))
            if (entry := self._entries.find(self._kept.pop(uid))) is not None:
                entry.last_words.pop(uid, None)

    def _bury(self, uid: str, version: int) -> None:
        """Note a deletion: a late answer may still show an older view of the object."""
        self._buried[uid] = max(version, self._buried.pop(uid, version))
        while len(self._buried) > _MAX_BURIED:
            del self._buried[next(iter(self._buried))]

    def is_buried(self, uid: str) -> bool:
        """Whether the object was deleted, not too long ago."""
        return uid in self._buried

    def _is_buried(self, uid: str, version: int) -> bool:
        return uid in self._buried and version <= self._buried[uid]

    def _version(self, metadata: Object) -> int:
        return self._number(str(metadata.get("resourceVersion", "")))

    def _number(self, version: str) -> int:
        number = version_number(version)
        self._ordered = self._ordered and number >= 0
        return number


def _observed(jobs: Iterable[Child | ChildView], pods: Iterable[Child | ChildView], entry: Entry | None) -> Observed:
    found = {child.value.uid: child.value for child in pods if isinstance(child.value, Pod)}
    return collect(
        (child.value for child in jobs if isinstance(child.value, ChildJob)),
        (found | (entry.last_words if entry is not None else {})).values(),
    )


def _jobs(entry: Entry, labelled: str = "") -> set[Key]:
    """Return the job of the entry, else the one in a child's label, else none."""
    if entry.key is not None:
        return {entry.key}
    return {(entry.job_id[0], labelled)} if labelled else set()


def _report_unreadable(kind: ChildKind, child: ChildView, before: Child | None) -> None:
    """Log it, once and not at each of its changes."""
    known, value = before is not None and before.value is not None and before.value.unreadable, child.value
    if value is not None and value.unreadable and not known:
        key = (child.namespace, child.job_name)
        logger.warning(
            "%s %s cannot be read, so it counts as there: %s", kind, value.name, value.unreadable, extra={"key": key}
        )


def _has_ended(body: Object) -> bool:
    return (body.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _marks(kept: Object) -> bytes:
    """Hash the fields that a relevant update changes and a status write does not."""
    text = json.dumps(
        [kept.get(name) for name in ("generation", "deletionTimestamp", "labels", "annotations")], sort_keys=True
    )
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _packed(data: bytes) -> bytes:
    """Compress data to a third, unless there is little to gain, as without a status."""
    return data if len(data) < _WORTH_PACKING else zlib.compress(data, _COMPRESSION)


def _unpacked(data: bytes) -> bytes:
    return data if data.startswith(b"{") else zlib.decompress(data)
