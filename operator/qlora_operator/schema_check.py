"""Compares the schema that the API server serves with the fields that this operator reads and writes.

The API server drops a field of the spec that it does not know, and rejects a status with one: an operator that is newer
than the CustomResourceDefinition could start no job.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from qlora_api.crd import custom_resource_definition
from qlora_api.v1alpha1 import KIND
from qlora_operator.cluster import ClusterError, NotFoundError
from qlora_operator.decisions.observe import Object

logger = logging.getLogger(__name__)

NO_DEFINITION = "the cluster does not know QLoRAJob: apply the CustomResourceDefinition of this release"
_LONGEST_PAUSE = 30.0

Schema = Mapping[str, Any]


class Schemas(Protocol):
    """What the check needs of the API server."""

    async def get_schema(self) -> Object:
        """The OpenAPI document of the resource's version. Raises ClusterError."""
        ...


class SchemaCheck:
    """Waits until the API server serves every field of this release."""

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self.problem: str | None = "the schema of QLoRAJob has not been read yet"

    async def run(self) -> None:
        """Return when the definition has every field. What is waited for is logged once."""
        pause = 1.0
        while problem := await self._look():
            if problem != self.problem:
                logger.error("waiting: %s", problem)
                self.problem = problem
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self.problem = None

    async def _look(self) -> str | None:
        try:
            missing = missing_fields(await self._schemas.get_schema())
        except NotFoundError:
            return NO_DEFINITION
        except ClusterError as error:
            return f"the schema of QLoRAJob cannot be read: {error}"
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            return (
                f"the cluster's CustomResourceDefinition lacks {missing[0]}{more}, which this operator needs: "
                "apply the CustomResourceDefinition of this release"
            )
        return None


def missing_fields(document: Schema) -> list[str]:
    """Fields of the operator's own definition that the OpenAPI document lacks, as `status.phase`; outermost only."""
    served = _served_schema(document)
    if served is None:
        return [KIND]
    own = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return sorted(
        path for part in ("spec", "status") for path in _missing(own["properties"][part], _property(served, part), part)
    )


def _served_schema(document: Schema) -> Schema | None:
    schemas = (document.get("components") or {}).get("schemas") or {}
    for schema in schemas.values():
        kinds = schema.get("x-kubernetes-group-version-kind") or ()
        if any(kind.get("kind") == KIND for kind in kinds):
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
