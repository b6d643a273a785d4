"""Compares the schemas that the API server serves with the fields that this operator reads and writes.

The API server drops a field of the spec that it does not know, and rejects a status with one: an operator that is newer
than the CustomResourceDefinition can start no job, whether it finds the older one or somebody applies it meanwhile.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from qlora_api.crd import definitions
from qlora_api.v1alpha1 import GROUP, KIND, VERSION
from qlora_operator.cluster import ClusterError, NotFoundError
from qlora_operator.decisions.observe import Object

logger = logging.getLogger(__name__)

NO_DEFINITION = "the cluster does not know QLoRAJob: apply the CustomResourceDefinitions of this release"
_LONGEST_PAUSE, _PAUSE_WHILE_WAITING, _SHORTEST_PAUSE = 30.0, 3.0, 1.0
_MOST_NAMED = 3

Schema = Mapping[str, Any]


class Schemas(Protocol):
    """What the check needs of the API server."""

    async def get_schema(self) -> Object:
        """The OpenAPI document of the resource's version. Raises ClusterError."""
        ...


class SchemaCheck:
    """Waits until the API server serves every field of this release, and notices when it no longer does.

    `on_change` is told when fields are missing and when none is any more.
    """

    def __init__(self, schemas: Schemas, on_change: Callable[[bool], None] = lambda _lacks: None) -> None:
        self._schemas = schemas
        self._on_change = on_change
        self._suspected = asyncio.Event()
        self._judged: tuple[bytes, str | None] = (b"", None)
        self.problem: str | None = "the schema of QLoRAJob has not been read yet"

    async def run(self) -> None:
        """Return when the definition has every field. What is waited for is logged once."""
        pause = 1.0
        while problem := await self._explain():
            self._note(problem)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._clear()

    async def watch(self) -> None:
        """Check again and again, after `run`, until canceled. Each change is logged once.

        An API server that does not answer, or does not know the kind, says nothing about its fields.
        """
        while True:
            await self._pause()
            try:
                problem = self._judge(await self._schemas.get_schema())
            except ClusterError as error:
                logger.debug("the schema of QLoRAJob cannot be read: %s", error)
                continue
            if problem is not None:
                self._note(problem)
            elif self.problem is not None:
                logger.info("the cluster's CustomResourceDefinition has every field again")
                self._clear()

    def suspect(self) -> None:
        """Check soon, because the API server has rejected what this release writes."""
        self._suspected.set()

    async def _pause(self) -> None:
        # What is published of a definition follows it within seconds: one look at once may come too early.
        await asyncio.sleep(_SHORTEST_PAUSE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_PAUSE if self.problem is None else _PAUSE_WHILE_WAITING):
                await self._suspected.wait()
        self._suspected.clear()

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            logger.error("waiting: %s", problem)
            self.problem = problem
            # A schema that cannot be read says nothing about its fields.
            if problem == self._judged[1]:
                self._on_change(True)

    def _clear(self) -> None:
        self.problem = None
        self._on_change(False)

    async def _explain(self) -> str | None:
        try:
            return self._judge(await self._schemas.get_schema())
        except NotFoundError:
            return NO_DEFINITION
        except ClusterError as error:
            return f"the schema of QLoRAJob cannot be read: {error}"

    def _judge(self, document: Object) -> str | None:
        """What the document lacks. The same one is not compared again, which takes many times as long as a pass."""
        digest = hashlib.blake2b(json.dumps(document, sort_keys=True).encode()).digest()
        if digest != self._judged[0]:
            self._judged = digest, _lack(missing_fields(document))
        return self._judged[1]


def _lack(missing: list[str]) -> str | None:
    if not missing:
        return None
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    return (
        f"the cluster's CustomResourceDefinition ({GROUP}/{VERSION}) lacks {', '.join(missing[:_MOST_NAMED])}{more}, "
        "which this operator needs: apply the CustomResourceDefinitions of this release"
    )


def missing_fields(document: Schema) -> list[str]:
    """Fields of the operator's own definitions that the OpenAPI document lacks, as `status.phase`; outermost only.

    Those of another kind than QLoRAJob begin with it: `QLoRASweep.status.phase`.
    """
    return [path for kind, definition in definitions().items() for path in _missing_of(kind, definition, document)]


def _missing_of(kind: str, definition: Schema, document: Schema) -> list[str]:
    served = _served_schema(document, kind)
    if served is None:
        return [kind]
    own = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    prefix = "" if kind == KIND else f"{kind}."
    parts = ("spec", "status")
    return sorted(path for part in parts for path in _missing(own[part], _property(served, part), f"{prefix}{part}"))


def _served_schema(document: Schema, wanted: str) -> Schema | None:
    schemas = (document.get("components") or {}).get("schemas") or {}
    for schema in schemas.values():
        kinds = schema.get("x-kubernetes-group-version-kind") or ()
        if any(kind.get("kind") == wanted for kind in kinds):
            return dict(schema)
    return None


def _property(schema: Schema, name: str) -> Schema | None:
    found: Schema | None = (schema.get("properties") or {}).get(name)
    return found


def _missing(own: Schema, served: Schema | None, path: str) -> Iterator[str]:
    if served is None:
        yield path
    elif not served.get("x-kubernetes-preserve-unknown-fields"):
        for name, part in (own.get("properties") or {}).items():
            yield from _missing(part, _property(served, name), f"{path}.{name}")
        for keyword in ("items", "additionalProperties"):
            if isinstance(own.get(keyword), Mapping):
                yield from _missing(own[keyword], served.get(keyword) or {}, f"{path}[]")
