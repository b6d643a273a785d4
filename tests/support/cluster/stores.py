"""Stores of watched objects."""

from typing import Any

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.listing import ObjectVersion, object_version
from qlora_operator.watch.store import Store
from tests.support.builders import NAME

KEY = ("team", NAME)
OTHER = "ffffffff-0000-4000-8000-000000000000"


def at(version: int | str, body: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """The object in that version."""
    return body | {"metadata": body["metadata"] | {"resourceVersion": str(version)} | metadata}


def rows(kind: Any, *bodies: Object) -> list[ObjectVersion]:
    return [object_version(kind, body) for body in bodies]


def show(store: Store, kind: Any, type_: str, body: dict[str, Any]) -> None:
    if kind == "qlorajobs":
        store.job_changed(body, deleted=type_ == "DELETED", created=type_ == "ADDED")
    else:
        store.child_changed(kind, body, deleted=type_ == "DELETED")
