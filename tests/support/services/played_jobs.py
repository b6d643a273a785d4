"""QLoRAJobs in memory, served as an API server does: without its schema, rights and controllers."""

import itertools
import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.services.api_proxy import Reply, Request

_PATH = re.compile(r"/apis/qlora\.dev/v1beta1(/namespaces/(?P<namespace>[^/]+))?/qlorajobs(/(?P<name>[^/]+))?")
_SPEC = {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}}

Object = dict[str, Any]


class PlayedJobs:
    """The weather of an ApiProxy that has no API server behind it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.stored: dict[str, Object] = {}
        self._uids = itertools.count(1)

    def add(self, name: str, phase: str = "", spec: Object | None = None, **more: Any) -> Object:
        """Store a job, also in place of another one. `kind` is a label, other fields are of its status."""
        labels = {"kind": more.pop("kind", "")}
        status = {"phase": phase, **more} if phase else {}
        return self._create(
            name, {"metadata": {"name": name, "labels": labels}, "spec": _SPEC | (spec or {}), "status": status}
        )

    def _create(self, name: str, body: Object) -> Object:
        given = {"namespace": self.namespace, "uid": f"uid-{next(self._uids)}", "resourceVersion": "1"}
        metadata = body["metadata"] | given | {"creationTimestamp": "2026-01-02T03:04:05Z"}
        self.stored[name] = body | {"metadata": metadata}
        return self.stored[name]

    def __call__(self, request: Request) -> Reply:
        """Answer as the API server does."""
        address = urlsplit(request.path)
        found = _PATH.fullmatch(address.path)
        if found is None or found["namespace"] not in (None, self.namespace):
            return _failure(404, "the server could not find the requested resource")
        name, body = found["name"], json.loads(request.body or b"{}")
        if name is None and request.method == "POST":
            return _answer(self._create(body["metadata"]["name"], body))
        if name is None:
            selector = parse_qs(address.query).get("labelSelector", [""])[0].removeprefix("kind=")
            items = [job for job in self.stored.values() if selector in ("", job["metadata"]["labels"].get("kind"))]
            return _answer({"metadata": {}, "items": items})
        if name not in self.stored:
            return _failure(404, f'qlorajobs.qlora.dev "{name}" not found', name)
        if request.method == "PATCH":
            self.stored[name] = _merged(self.stored[name], body)
        if request.method == "DELETE":
            return self._delete(name, (body.get("preconditions") or {}).get("uid"))
        return _answer(self.stored[name])

    def _delete(self, name: str, uid: str | None) -> Reply:
        stored = self.stored[name]["metadata"]["uid"]
        if uid not in (None, stored):
            why = f"the UID in the precondition ({uid}) does not match the UID in record ({stored})"
            return _failure(409, f'Operation cannot be fulfilled on QLoRAJob.qlora.dev "{name}": {why}', name)
        return _answer(self.stored.pop(name))


def _merged(target: Any, change: Any) -> Any:
    """Merge as RFC 7396."""
    if not isinstance(change, dict):
        return change
    kept = {key: value for key, value in (target or {}).items() if key not in change}
    changes = {key: _merged((target or {}).get(key), value) for key, value in change.items() if value is not None}
    return kept | changes


def _answer(body: Object) -> Reply:
    return Reply(200, json.dumps(body).encode())


def _failure(code: int, message: str, name: str = "") -> Reply:
    status = {"kind": "Status", "message": message, "details": {"name": name} if name else {}, "code": code}
    return Reply(code, json.dumps(status).encode())
