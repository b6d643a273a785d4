"""Watches objects as any client does, to see from outside when something exists."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp

from qlora_operator.kube.connection import endpoint_of

_PATHS = {
    "qlorajobs": "/apis/qlora.dev/v1alpha1/qlorajobs",
    "jobs": "/apis/batch/v1/jobs",
    "pods": "/api/v1/pods",
}
# The answer for a new kind until the API server has read its stored objects.
_STARTING = 429
_METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


@dataclass(frozen=True)
class Event:
    """An event of a watch, and its arrival here, in seconds of the monotonic clock."""

    kind: str
    body: dict[str, Any]
    seconds: float


async def watch(
    kubeconfig: Path, objects: Literal["qlorajobs", "jobs", "pods"], *, metadata_only: bool = True
) -> AsyncIterator[Event]:
    """All events from the first object on, until the caller stops; after a lost connection once more from the first."""
    endpoint = await endpoint_of(kubeconfig)
    headers = {"Accept": _METADATA if metadata_only else "application/json"}
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
