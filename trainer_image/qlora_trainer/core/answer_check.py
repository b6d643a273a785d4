"""Checks answers as spec.gate.score says: in a process of its own, so that no pattern or schema can hang the step."""

import json
import logging
import multiprocessing
import re
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NoReturn, Self

from jsonschema import exceptions
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from qlora_api.gate import ScoreSpec
from qlora_api.printable import first_line, shortened
from qlora_trainer.core.failures import StepFailure, bad_configuration

SECONDS = 2.0
"""For one answer. Afterwards it has not passed."""
_SECONDS_TO_START = 120.0
_SECONDS_FOR_PARENT = 5.0
_MEMORY_BYTES = 2**31
# Of an answer that is no JSON, is nested too deeply, or meets a schema that refers to itself without end.
_NOT_PASSED = (ValueError, RecursionError, MemoryError)
_LATE = object()
logger = logging.getLogger(__name__)
Check = Callable[[str], bool]


def compiled(spec: ScoreSpec) -> Check:
    """Whether an answer passes, for a check that needs no answer of the row.

    Raises StepFailure BAD_CONFIGURATION for a pattern or schema that cannot be used.
    """
    if spec.pattern is not None:
        return _pattern(spec.pattern)
    return _schema(spec.json_schema or "")


def _pattern(text: str) -> Check:
    try:
        pattern = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise bad_configuration(
            f"spec.gate.score.pattern is no regular expression of Python: {first_line(error)}: found "
            f"{shortened(text, 100)!r}"
        ) from error
    return lambda answer: pattern.search(answer) is not None


def _schema(text: str) -> Check:
    try:
        schema = json.loads(text, parse_constant=_reject_constant)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        _require_own_references(schema)
    except (exceptions.SchemaError, Unresolvable, ValueError, RecursionError) as error:
        raise bad_configuration(
            f"spec.gate.score.schema is no JSON schema: {first_line(error)}: correct it; a $ref must lead to a part of "
            "the same schema, such as #/$defs/NAME"
        ) from error
    # With a registry of its own nothing is looked up elsewhere, as jsonschema would do over the network.
    validator: Validator = kind(schema, registry=Registry())
    return lambda answer: validator.is_valid(json.loads(answer, parse_constant=_reject_constant))


def _require_own_references(schema: Any) -> None:
    """Raise Unresolvable unless every $ref leads to a part of the schema."""
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for reference in _references(schema):
        resolver.lookup(reference)


def _references(node: Any) -> Iterator[str]:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and isinstance(node.get("$ref"), str):
        yield node["$ref"]
    for child in children:
        yield from _references(child)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class _Worker:
    """The process that checks."""

    process: SpawnProcess
    connection: Connection

    @classmethod
    def start(cls, spec: ScoreSpec, seconds: float) -> "_Worker":
        """Start one. Raises StepFailure BAD_CONFIGURATION for a pattern or schema that cannot be used."""
        # Spawned, not forked: CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        worker = cls(context.Process(target=_serve, args=(there, spec, seconds), daemon=True), here)
        worker.process.start()
        there.close()
        problem = worker.answer(_SECONDS_TO_START)
        if problem is not None:
            worker.stop()
            raise problem if isinstance(problem, StepFailure) else _unusable(spec)
        return worker

    def answer(self, seconds: float) -> Any:
        """What it has sent; _LATE if it takes longer than that, or has ended."""
        try:
            return self.connection.recv() if self.connection.poll(seconds) else _LATE
        except EOFError:
            return _LATE

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _unusable(spec: ScoreSpec) -> StepFailure:
    field = "pattern" if spec.pattern is not None else "schema"
    return bad_configuration(
        f"spec.gate.score.{field} cannot be read within {_SECONDS_TO_START:g} seconds: simplify it"
    )


def _serve(connection: Connection, spec: ScoreSpec, seconds: float) -> None:
    """Send None or what is wrong with the check; then, for each answer that comes, whether it passes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # The parent decides when to stop, and may have been killed.
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_START)
    try:
        check = compiled(spec)
    except StepFailure as failure:
        connection.send(failure)
        return
    connection.send(None)
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            answer = connection.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds + _SECONDS_FOR_PARENT)
        try:
            passed = check(answer)
        except _NOT_PASSED:
            passed = False
        connection.send(passed)


class AnswerChecker:
    """Checks one answer after the other. Use it as a context manager: it keeps a process."""

    def __init__(self, spec: ScoreSpec, *, seconds: float = SECONDS) -> None:
        self._spec, self._seconds = spec, seconds
        self._worker: _Worker | None = None

    def __enter__(self) -> Self:
        """Start. Raises StepFailure BAD_CONFIGURATION for a pattern or schema that cannot be used."""
        if self._spec.check != "exactMatch":
            self._worker = _Worker.start(self._spec, self._seconds)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Stop."""
        if self._worker is not None:
            self._worker.stop()

    def passes(self, answer: str, own: str) -> bool:
        """Whether the answer passes. `own` is that of the row."""
        if self._worker is None:
            return answer.strip() == own.strip()
        self._worker.connection.send(answer)
        passed = self._worker.answer(self._seconds)
        if passed is _LATE:
            logger.warning("an answer took more than %g seconds to check, and has not passed", self._seconds)
            self._worker.stop()
            self._worker = _Worker.start(self._spec, self._seconds)
        return passed is True
