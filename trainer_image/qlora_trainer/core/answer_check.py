"""Checks answers as spec.gate.score says: in a process of its own, so that no pattern or schema can hang the step."""

import json
import logging
import multiprocessing
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry, Resource
from referencing.jsonschema import specification_with

from qlora_api.gate import ScoreSpec
from qlora_api.printable import first_line, shortened
from qlora_trainer.core.failures import StepFailure, bad_configuration

SECONDS = 2.0
"""For one answer, of the processor and not of the clock: a busy node changes nothing. Afterwards it has not passed."""
_SECONDS_TO_READ = 30.0
# What is caught along the way does not stop the timer: it goes off again.
_AGAIN_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
"""Of the clock: afterwards the process is taken to hang."""
_MOST_RESTARTS = 10
_MEMORY_BYTES = 2**31
# Of an answer that is no JSON, is nested too deeply, or meets a schema that refers to itself without end.
_NOT_PASSED = (ValueError, RecursionError, MemoryError)
_END_OF_REASONING = "</think>"
logger = logging.getLogger(__name__)
Check = Callable[[str], bool]
_Result = TypeVar("_Result")


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
        schema = _object_or_boolean(text)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        _require_own_references(schema, kind)
    except TimeoutError:
        raise
    except Exception as error:
        # Libraries raise whatever a malformed schema leads them to.
        raise bad_configuration(
            f"spec.gate.score.schema is no JSON schema: {first_line(error)}: correct it; a $ref must lead to a part of "
            "the same schema, such as #/$defs/NAME"
        ) from error
    # With a registry of its own nothing is looked up elsewhere, as jsonschema would do over the network.
    validator: Validator = kind(schema, registry=Registry())
    return lambda answer: validator.is_valid(json.loads(answer, parse_constant=_reject_constant))


def _object_or_boolean(text: str) -> Any:
    schema = json.loads(text, parse_constant=_reject_constant)
    if not isinstance(schema, dict | bool):
        raise TypeError(f"it is {shortened(text, 40)}, and must be an object, true or false")
    return schema


def _require_own_references(schema: Any, kind: Any) -> None:
    """Raise Unresolvable unless every reference of a schema of this kind leads to a part of it."""
    root: Resource[Any] = specification_with(kind.ID_OF(kind.META_SCHEMA)).create_resource(schema)
    parts = [(root, Registry().resolver_with_root(root))]
    while parts:
        part, resolver = parts.pop()
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(part.contents, dict) and isinstance(reference := part.contents.get(keyword), str):
                resolver.lookup(reference)
        # What an enum, const or default contains is no part of the schema, and each part may have an $id.
        parts += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class _Ended:
    """A process that does not answer any more."""

    why: str


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
        problem = worker.received()
        if problem is not None:
            worker.stop()
            raise _unusable(spec, problem.why) if isinstance(problem, _Ended) else problem
        return worker

    def ask(self, answer: str) -> Any:
        """Whether the answer passes, why it could not be checked, or that the process has ended."""
        try:
            self.connection.send(answer)
        except OSError:
            return self._ended()
        return self.received()

    def received(self) -> Any:
        """What it sends next."""
        try:
            if self.connection.poll(_PATIENCE_SECONDS):
                return self.connection.recv()
        except (EOFError, OSError):
            return self._ended()
        return _Ended(f"it did not reply within {_PATIENCE_SECONDS:g} seconds")

    def _ended(self) -> _Ended:
        self.process.join()
        return _Ended(f"its process ended with exit code {self.process.exitcode}")

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _unusable(spec: ScoreSpec, why: str) -> StepFailure:
    field = "pattern" if spec.pattern is not None else "schema"
    return bad_configuration(f"spec.gate.score.{field} cannot be used: {why}: simplify it")


def _serve(connection: Connection, spec: ScoreSpec, seconds: float) -> None:
    """Send None or what is wrong with the check; then, for each answer that comes, whether it passes, or why not."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # The parent decides when to stop, and may have been killed.
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGVTALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        check = _limited(lambda: compiled(spec), _SECONDS_TO_READ)
    except StepFailure as failure:
        connection.send(failure)
        return
    except TimeoutError:
        connection.send(_unusable(spec, f"reading it takes more than {_SECONDS_TO_READ:g} seconds"))
        return
    connection.send(None)
    while True:
        try:
            answer = connection.recv()
        except EOFError:
            return
        connection.send(_checked(check, answer, seconds))


def _checked(check: Check, answer: str, seconds: float) -> bool | str:
    """Whether the answer passes; why it could not be checked, if something other than the answer may be the cause."""
    try:
        return _limited(lambda: check(answer), seconds)
    except _NOT_PASSED:
        return False
    except TimeoutError:
        return f"it took more than {seconds:g} seconds"
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is sent to the parent
        return f"{type(error).__name__}: {first_line(error)}"


def _limited(work: Callable[[], _Result], seconds: float) -> _Result:
    """The result. Raises TimeoutError after that much computing."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _late(_signal: int, _frame: object) -> NoReturn:
    raise TimeoutError


class AnswerChecker:
    """Checks one answer after the other. Use it as a context manager: it keeps a process."""

    def __init__(self, spec: ScoreSpec, *, seconds: float = SECONDS) -> None:
        self._spec, self._seconds = spec, seconds
        self._worker: _Worker | None = None
        self._restarts = 0

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
        """Whether the answer passes. `own` is that of the row. Reasoning before either is not looked at.

        Raises StepFailure BAD_CONFIGURATION for a pattern or schema with which the checking process ends every time.
        """
        answer, own = (text.rpartition(_END_OF_REASONING)[2] for text in (answer, own))
        if self._worker is None:
            return answer.strip() == own.strip()
        found = self._worker.ask(answer)
        if isinstance(found, bool):
            return found
        why = found.why if isinstance(found, _Ended) else found
        logger.warning("an answer could not be checked, and has not passed: %s", why)
        if isinstance(found, _Ended):
            self._restart(why)
        return False

    def _restart(self, why: str) -> None:
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise _unusable(self._spec, f"with {self._restarts} answers it failed, the last time because {why}")
        if self._worker is not None:
            self._worker.stop()
        self._worker = _Worker.start(self._spec, self._seconds)
