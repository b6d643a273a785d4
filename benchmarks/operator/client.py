"""Sends requests and watches objects, under a name that differs from the operator's in the audit log."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from qlora_operator.kube.connection import endpoint_of
from qlora_operator.kube.transport import Query, Transport, open_transport

AGENT = "qlora-benchmark"
_MERGE = "application/merge-patch+json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_PROTOBUF = "application/vnd.kubernetes.protobuf"
_PAGE = "500"

Object = dict[str, Any]


class Client:
    """The requests of the benchmarks, which raise RuntimeError with the answer."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def get(self, path: str) -> Object:
        """One object."""
        return dict(json.loads(await self._send("GET", path)))

    async def items(self, path: str, selector: str = "", *, metadata_only: bool = False) -> list[Object]:
        """A list, page by page."""
        found: list[Object] = []
        query = [("limit", _PAGE), *([("labelSelector", selector)] if selector else [])]
        while True:
            accept = _METADATA if metadata_only else "application/json"
            page = json.loads(await self._send("GET", path, query=query, accept=accept))
            found += page["items"] or ()
            if not (token := page["metadata"].get("continue")):
                return found
            query = [entry for entry in query if entry[0] != "continue"] + [("continue", token)]

    async def stored_bytes(self, path: str, query: Query | None = None) -> int:
        """The size of a list of a built-in kind, as etcd has it: protobuf."""
        return len(await self._send("GET", path, query=query, accept=_PROTOBUF))

    async def create(self, path: str, body: Object) -> Object:
        """Create an object; returns it as it is stored."""
        return dict(json.loads(await self._send("POST", path, body=body)))

    async def replace(self, path: str, body: Object) -> Object:
        """Replace an object; returns it as it is stored."""
        return dict(json.loads(await self._send("PUT", path, body=body)))

    async def merge(self, path: str, body: Object) -> Object:
        """Change the fields of `body`; returns the object as it is stored."""
        return dict(json.loads(await self._send("PATCH", path, body=body, content_type=_MERGE)))

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Object | None = None,
        accept: str = "application/json",
        content_type: str = "application/json",
    ) -> bytes:
        headers = {"Accept": accept, "Content-Type": content_type}
        status, data = await self._transport.send(method, path, query=query, body=body, headers=headers)
        if status >= 400:
            raise RuntimeError(f"{method} {path}: {status} {data[:500].decode(errors='replace')}")
        return data


@asynccontextmanager
async def connect(kubeconfig: Path) -> AsyncIterator[Client]:
    """A client whose connections end with the block."""
    async with open_transport(await endpoint_of(kubeconfig), AGENT) as transport:
        yield Client(transport)


_PATHS = {
    "qlorajobs": "/apis/qlora.dev/v1beta1/qlorajobs",
    "jobs": "/apis/batch/v1/jobs",
    "pods": "/api/v1/pods",
}
# The answer for a new kind until the API server has read its stored objects.
_STARTING = 429
_METADATA_OF_ONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


@dataclass(frozen=True)
class Event:
    """An event of a watch, and its arrival here, in seconds of the monotonic clock."""

    kind: str
    body: dict[str, Any]
    seconds: float


async def watch(
    kubeconfig: Path, objects: Literal["qlorajobs", "jobs", "pods"], *, metadata_only: bool = True
) -> AsyncIterator[Event]:
    """Yield all events, after a lost connection again from the first object on."""
    endpoint = await endpoint_of(kubeconfig)
    headers = {"Accept": _METADATA_OF_ONE if metadata_only else "application/json"}
    credentials = await endpoint.credentials()
    if credentials.authorization:
        headers["Authorization"] = credentials.authorization
    url = f"{endpoint.server}{_PATHS[objects]}?watch=true"
    connector = aiohttp.TCPConnector(ssl=credentials.tls)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(), read_bufsize=2**21
    ) as session:
        while True:
            async with session.get(url, headers=headers) as response:
                if response.status == _STARTING:
                    await asyncio.sleep(1)
                    continue
                response.raise_for_status()
                async for line in response.content:
                    event = json.loads(line)
                    yield Event(event["type"], event["object"], time.monotonic())
