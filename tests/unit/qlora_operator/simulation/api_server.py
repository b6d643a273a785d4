"""An API server in memory, behind the operator's real client: it stores, lists, watches and fails."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from qlora_operator.kube.transport import Query, Transport
from tests.unit.qlora_operator.simulation.agenda import Agenda

Object = dict[str, Any]
NAMESPACE = "team"
Watch = Callable[[str, str, Object], None]
"""Called with the kind, the type of the event and the object."""
_UNWATCHED = ("events", "services", "networkpolicies", "controllerrevisions")


class AnswerError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class ApiServer(Transport):
    """The objects of one namespace. A stored object is never changed: a newer one replaces it."""

    def __init__(self, agenda: Agenda) -> None:
        self.objects: dict[str, dict[str, Object]] = {}
        self.watches: list[Watch] = []
        self.check: Callable[[str, str, Object | None, Object | None], None] = lambda *_: None
        """Called before each write of the operator: method, kind, the object as it is and as it is to be."""
        self.logs: Callable[[Object], str | None] = lambda _pod: None
        self.errors = self.lost_answers = self.races = 0.0
        """Parts of the requests that fail, that lose their answer, and that the cluster overtakes."""
        self.rejected: set[str] = set()
        """Kinds whose objects may not be created."""
        self.writes = 0
        self._agenda, self._versions, self._uids = agenda, itertools.count(100), itertools.count(1)

    def all(self, kind: str) -> list[Object]:
        return list(self.objects.get(kind, {}).values())

    def get(self, kind: str, name: str) -> Object | None:
        return self.objects.get(kind, {}).get(name)

    def owned(self, kind: str, uid: str) -> list[Object]:
        """The objects that this one controls."""
        return [body for body in self.all(kind) if controller(body).get("uid") == uid]

    def put(self, kind: str, *bodies: Object) -> None:
        """Store the objects as they are, in place of others of their names, which no watch shows."""
        self.objects.setdefault(kind, {}).update({body["metadata"]["name"]: body for body in bodies})

    def create(self, kind: str, body: Mapping[str, Any]) -> Object:
        """Store a new object. Raises AnswerError if the name is taken, or the kind rejected."""
        name = body["metadata"]["name"]
        if kind in self.rejected:
            raise AnswerError(403, "exceeded quota")
        if name in self.objects.setdefault(kind, {}):
            raise AnswerError(409, "AlreadyExists")
        uid = f"{next(self._uids):08x}-0000-4000-8000-000000000000"
        made = {"uid": uid, "namespace": NAMESPACE, "creationTimestamp": self._agenda.stamp(), "generation": 1}
        return self._store(
            kind, {"status": {"observedGeneration": -1}, **body, "metadata": {**body["metadata"], **made}}, "ADDED"
        )

    def change(self, kind: str, name: str, **parts: Any) -> Object:
        """Replace parts of the object, and merge those of its metadata."""
        before = self.objects[kind][name]
        body = {**before, **parts, "metadata": {**before["metadata"], **parts.get("metadata", {})}}
        if body == before:
            return before
        if body.get("spec") != before.get("spec"):
            body["metadata"]["generation"] += 1
        return self._store(kind, body, "MODIFIED")

    def remove(self, kind: str, name: str) -> None:
        """Remove the object immediately."""
        if body := self.objects[kind].get(name):
            self._store(kind, body, "DELETED")

    def _store(self, kind: str, body: Object, event: str) -> Object:
        body["metadata"] = {**body["metadata"], "resourceVersion": str(next(self._versions))}
        if event == "DELETED":
            del self.objects[kind][body["metadata"]["name"]]
        else:
            self.objects[kind][body["metadata"]["name"]] = body
        if kind not in _UNWATCHED:
            for watch in self.watches:
                watch(kind, event, body)
        return body

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout | None = None,  # noqa: ASYNC109 - as the operator's
        most: int | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
    ) -> tuple[int, bytes]:
        """Answer a request of the operator, or fail as a network does."""
        chance = self._agenda.random.random
        if chance() < self.races:
            self._agenda.happen_meanwhile()
        if chance() < self.errors:
            raise TimeoutError
        place = path.partition(f"/namespaces/{NAMESPACE}/")[2] or path.rpartition("/")[2]
        try:
            answer = self._answer(method, place.split("/"), dict(query or ()), body)
        except AnswerError as error:
            return error.status, json.dumps({"reason": error.reason, "message": error.reason}).encode()
        if method != "GET" and chance() < self.lost_answers:
            raise TimeoutError
        return 200, answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()

    def _answer(self, method: str, place: list[str], query: dict[str, str], body: Any) -> Object | str:
        kind, name, *sub = [*place, ""] if len(place) == 1 else place
        if method == "GET" and not name:
            return self._list(kind, query)
        before = self.get(kind, name)
        if query.get("dryRun"):
            return dict(body)
        if method == "POST":
            return self._written(method, kind, None, body, lambda: self.create(kind, body))
        if before is None and kind == "networkpolicies":
            return self._written(method, kind, None, body, lambda: self.create(kind, body))
        if before is None:
            raise AnswerError(404, "NotFound")
        if method == "GET":
            return self._log(before) if sub == ["log"] else before
        if method == "DELETE":
            _require_same(before, body["preconditions"])
            return self._written(method, kind, before, None, lambda: self._removed(kind, before))
        _require_same(before, body.get("metadata", {}))
        if sub == ["status"]:
            after = {**before, "status": body["status"]}
            return self._written(method, kind, before, after, lambda: self.change(kind, name, status=body["status"]))
        return self._written(method, kind, before, body, lambda: self.merge(kind, name, body))

    def _written(
        self, method: str, kind: str, before: Object | None, after: Object | None, act: Callable[[], Object]
    ) -> Object:
        if kind != "events":
            self.writes += 1
        self.check(method, kind, before, after)
        return act()

    def _removed(self, kind: str, before: Object) -> Object:
        name = before["metadata"]["name"]
        if kind == "persistentvolumeclaims":
            return self.change(kind, name, metadata={"deletionTimestamp": self._agenda.stamp()})
        self.remove(kind, name)
        return before

    def merge(self, kind: str, name: str, patch: Mapping[str, Any]) -> Object:
        """Merge the patch into metadata and spec (RFC 7386)."""
        before = self.objects[kind][name]
        spec, metadata = merged(before["spec"], patch.get("spec", {})), merged(before["metadata"], patch["metadata"])
        return self.change(kind, name, spec=spec, metadata=metadata)

    def _list(self, kind: str, query: dict[str, str]) -> Object:
        items = [body for body in self.all(kind) if _selected(body, query)]
        return {"metadata": {"resourceVersion": str(next(self._versions))}, "items": items}

    def _log(self, pod: Object) -> str:
        log = self.logs(pod)
        if log is None:
            raise AnswerError(400, "no container runs")
        return log


def controller(body: Mapping[str, Any]) -> Object:
    """Return the reference to the object's controller, empty without one."""
    return next((owner for owner in body["metadata"].get("ownerReferences", ()) if owner.get("controller")), {})


def owned_by(body: Mapping[str, Any], uid: str) -> bool:
    """Whether this is one of its owners."""
    return any(owner["uid"] == uid for owner in body["metadata"].get("ownerReferences", ()))


def merged(before: Mapping[str, Any], patch: Mapping[str, Any]) -> Object:
    """Merge a patch (RFC 7386)."""
    changed = dict(before)
    for key, value in patch.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = merged(changed.get(key) or {}, value) if isinstance(value, Mapping) else value
    return changed


def _require_same(found: Object, wanted: Mapping[str, Any]) -> None:
    metadata = found["metadata"]
    for field in ("uid", "resourceVersion"):
        if field in wanted and wanted[field] != metadata[field]:
            raise AnswerError(409, "Conflict")


def _selected(body: Object, query: dict[str, str]) -> bool:
    labels = body["metadata"].get("labels") or {}
    label, _, value = query.get("labelSelector", "").partition("=")
    if label and (label not in labels or (value and labels[label] != value)):
        return False
    return all(_has_field(body, *term) for term in _terms(query.get("fieldSelector", "")))


def _terms(selector: str) -> Iterator[tuple[str, str, bool]]:
    for term in filter(None, selector.split(",")):
        field, sign, value = term.partition("!=") if "!=" in term else term.partition("=")
        yield field, value, sign == "="


def _has_field(body: Object, field: str, value: str, equal: bool) -> bool:
    part, _, name = field.partition(".")
    return ((body.get(part) or {}).get(name) == value) == equal
