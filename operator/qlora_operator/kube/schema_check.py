"""Compares the served schemas with the fields that this operator reads and writes.

The API server drops a field of the spec that its schema lacks, and rejects a status with one: an operator that is newer
than the CustomResourceDefinition can start no job, whether it finds the older one or an administrator applies it later.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from typing import Protocol

from qlora_api.served_schema import missing_fields
from qlora_api.spec.job import GROUP, VERSION
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import ClusterError, NotFoundError

logger = logging.getLogger(__name__)

NO_DEFINITION = "the cluster does not know QLoRAJob: apply the CustomResourceDefinitions of this release"
_LONGEST_PAUSE, _PAUSE_WHILE_WAITING, _SHORTEST_PAUSE = 30.0, 3.0, 1.0
_MOST_NAMED = 3


class Schemas(Protocol):
    """The API server's part in the check."""

    async def get_schema(self) -> Object:
        """The OpenAPI document of the resource's version. Raises ClusterError."""
        ...


class SchemaCheck:
    """Waits until the API server serves every field of this release, then watches.

    `on_change` is called when fields are missing and when none is any more.
    """

    def __init__(self, schemas: Schemas, on_change: Callable[[bool], None] = lambda _lacks: None) -> None:
        self._schemas = schemas
        self._on_change = on_change
        self._suspected = asyncio.Event()
        self._judged: tuple[bytes, str | None] = (b"", None)
        self.problem: str | None = "the schema of QLoRAJob has not been read yet"

    async def run(self) -> None:
        """Return when the definition has every field, and log a reason to wait once."""
        pause = 1.0
        while problem := await self._explain():
            self._note(problem)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._clear()

    async def watch(self) -> None:
        """Check repeatedly, after `run`, until canceled. Each change is logged once.

        An API server that does not answer, or lacks the kind, is no evidence about its fields.
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
        # A definition is published within seconds: one immediate read may come too early.
        await asyncio.sleep(_SHORTEST_PAUSE)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LONGEST_PAUSE if self.problem is None else _PAUSE_WHILE_WAITING):
                await self._suspected.wait()
        self._suspected.clear()

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            logger.error("waiting: %s", problem)
            self.problem = problem
            # A schema that cannot be read is no evidence about its fields.
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
        """Return the document's missing fields.

        An equal document is not compared again, which takes many times as long as a pass.
        """
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
