"""Copies a finished job with its Jobs and pods: thousands of them, without the hours that they took.

The copies have the objects that the operator, the Job controller and a node have written for the original, with other
names and UIDs. Claims are not copied: the operator does not watch them. Stop the Job controller first: it would create
pods for Jobs that have no status yet.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.operator.client import Client, Object
from benchmarks.operator.objects import BATCH, COPIED_LABEL, CORE, NAMESPACE, jobs_path
from qlora_api.naming import JOB_UID_LABEL

_AT_A_TIME = 32
_GENERATED_LABELS = ("controller-uid", "batch.kubernetes.io/controller-uid")
_JOBS, _PODS = f"{BATCH}/namespaces/{NAMESPACE}/jobs", f"{CORE}/namespaces/{NAMESPACE}/pods"


@dataclass(frozen=True)
class Template:
    """A finished job, and its remaining Jobs and pods."""

    job: Object
    children: tuple[Object, ...]
    pods: tuple[Object, ...]


async def template(client: Client, name: str) -> Template:
    """The job of that name as it is now."""
    job = await client.get(f"{jobs_path()}/{name}")
    selector = f"{JOB_UID_LABEL}={job['metadata']['uid']}"
    return Template(job, tuple(await client.items(_JOBS, selector)), tuple(await client.items(_PODS, selector)))


async def copy(client: Client, original: Template, names: list[str]) -> None:
    """Create a copy under each of the names."""
    left = iter(names)

    async def create() -> None:
        for name in left:
            await _copy(client, original, name)

    await asyncio.gather(*(create() for _ in range(_AT_A_TIME)))


async def _copy(client: Client, original: Template, name: str) -> None:
    known = {original.job["metadata"]["name"]: name}
    known |= await _create(client, jobs_path(), bare(original.job, known))
    for child in original.children:
        body = bare(child, known)
        body["spec"].pop("selector", None)
        for metadata in (body["metadata"], body["spec"]["template"]["metadata"]):
            metadata["labels"] = {
                key: value for key, value in metadata["labels"].items() if key not in _GENERATED_LABELS
            }
        known |= await _create(client, _JOBS, body)
        await _write_status(client, _JOBS, renamed(child, known))
    for pod in original.pods:
        body = bare(pod, known)
        body["metadata"]["labels"][COPIED_LABEL] = "true"
        await _create(client, _PODS, body)
        await _write_status(client, _PODS, renamed(pod, known))
    await _write_status(client, jobs_path(), renamed(original.job, known))


async def _create(client: Client, path: str, body: Object) -> dict[str, str]:
    """Create it; its UID by that of the original."""
    original = body["metadata"].pop("uid")
    created = await client.create(path, body)
    return {original: created["metadata"]["uid"]}


async def _write_status(client: Client, path: str, body: Object) -> None:
    await client.merge(f"{path}/{body['metadata']['name']}/status", {"status": body["status"]})


def bare(body: Object, known: Mapping[str, str]) -> Object:
    """The objects of a copy, with the UID of the original."""
    metadata = body["metadata"]
    copied = renamed(body, known)
    kept = ("name", "namespace", "labels", "annotations", "ownerReferences")
    copied["metadata"] = {key: copied["metadata"][key] for key in kept if key in metadata} | {"uid": metadata["uid"]}
    del copied["status"]
    return copied


def renamed(body: Object, known: Mapping[str, str]) -> Object:
    """The object with these names and UIDs replaced, wherever they are in it."""
    text = json.dumps(body)
    for old, new in known.items():
        text = text.replace(old, new)
    copied: dict[str, Any] = json.loads(text)
    return copied
