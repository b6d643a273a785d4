"""Checks answers for spec.gate.score in a process, so that none can hang the step."""

import json
import logging
import multiprocessing
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, TypeVar

from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from qlora_api.contract import ExitCode
from qlora_api.printable import first_line, shortened
from qlora_api.spec.gate import ScoreSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.data.render.reasoning import END_OF_REASONING, after_reasoning

SECONDS = 2.0
"""Most processor time for one answer, to be independent of a busy node."""
_SECONDS_TO_READ = 30.0
# The timer fires again, because its exception may have been caught.
_AGAIN_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
"""Of the clock: afterwards the process is taken to hang."""
_MOST_RESTARTS = 10
_MEMORY_BYTES = 2**31
# Of an answer that is no JSON, is nested too deeply, or meets a schema that refers to itself without end.
_NOT_PASSED = (ValueError, RecursionError, MemoryError)
logger = logging.getLogger(__name__)
Check = Callable[[str], bool]
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Criterion:
    """The criterion for answers: the job's, or the one in a row."""

    check: Literal["regex", "jsonSchema"]
    text: str
    """The regular expression, or the schema as JSON."""
    source: str
    """The field of the job, or the place in the data, for messages."""
    exit_code: ExitCode = ExitCode.BAD_DATASET
    """Of a criterion that cannot be used."""
    seconds_to_read: float = SECONDS

    @classmethod
    def of_job(cls, spec: ScoreSpec) -> "Criterion | None":
        """The job's criterion for all rows, or None."""
        if spec.check == "exactMatch" or spec.of_rows:
            return None
        field, text = ("pattern", spec.pattern) if spec.check == "regex" else ("schema", spec.json_schema)
        source = f"spec.gate.score.{field}"
        return cls(spec.check, text or "", source, ExitCode.BAD_CONFIGURATION, _SECONDS_TO_READ)

    def unusable(self, why: str) -> StepFailure:
        """The failure of a criterion that cannot be used."""
        return self._failure(f"cannot be used: {why}: simplify it")

    def compile(self) -> Check:
        """Compile the check. Raises StepFailure for an invalid pattern or schema."""
        return self._pattern() if self.check == "regex" else self._schema()

    def _failure(self, what: str) -> StepFailure:
        return StepFailure(self.exit_code, f"{self.source} {what}")

    def _pattern(self) -> Check:
        try:
            pattern = re.compile(self.text)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._failure(
                f"is no regular expression of Python: {first_line(error)}: correct it; found "
                f"{shortened(self.text, 100)!r}"
            ) from error
        return lambda answer: pattern.search(answer) is not None

    def _schema(self) -> Check:
        try:
            schema = _object_or_boolean(self.text)
            kind = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
            _require_own_references(schema)
        except TimeoutError:
            raise
        except Exception as error:
            # Libraries raise whatever a malformed schema leads them to.
            raise self._failure(
                f"is no JSON schema: {first_line(error)}: correct it; a $ref must lead to a part of the same schema, "
                "such as #/$defs/NAME"
            ) from error
        # With a separate registry no reference is fetched, as jsonschema would do over the network.
        validator: Validator = kind(schema, registry=Registry())
        return lambda answer: validator.is_valid(json.loads(answer, parse_constant=_reject_constant))


def _object_or_boolean(text: str) -> Any:
    schema = json.loads(text, parse_constant=_reject_constant)
    if not isinstance(schema, dict | bool):
        raise TypeError(f"it is {shortened(text, 40)}, and must be an object, true or false")
    return schema


def _require_own_references(schema: JsonObject | bool) -> None:
    """Raise Unresolvable if a reference of the schema leads out of it."""
    root: Resource[object] = Resource.from_contents(schema, default_specification=DRAFT202012)
    parts = [(root, Registry().resolver_with_root(root))]
    while parts:
        part, resolver = parts.pop()
        for keyword in ("$ref", "$dynamicRef"):
            if isinstance(part.contents, dict) and isinstance(reference := part.contents.get(keyword), str):
                resolver.lookup(reference)
        # The content of an enum, const or default is no part of the schema, and each part may have an $id.
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
    def start(cls, seconds: float) -> "_Worker":
        """Start one, which takes `seconds` of the processor for an answer at most."""
        # Spawned, not forked: CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        worker = cls(context.Process(target=_serve, args=(there, seconds), daemon=True), here)
        worker.process.start()
        there.close()
        return worker

    def ask(self, criterion: Criterion, answer: str | None = None) -> Any:
        """Whether the answer passes, why it could not be checked, or that the process has ended.

        Without an answer: None if the criterion can be used, else the StepFailure.
        """
        try:
            self.connection.send((criterion, answer))
        except OSError:
            return self._report_end()
        try:
            if self.connection.poll(_PATIENCE_SECONDS):
                return self.connection.recv()
        except (EOFError, OSError):
            return self._report_end()
        return _Ended(f"it did not reply within {_PATIENCE_SECONDS:g} seconds")

    def _report_end(self) -> _Ended:
        self.process.join()
        return _Ended(f"its process ended with exit code {self.process.exitcode}")

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, seconds: float) -> None:
    """Answer each question of `_Worker.ask` that comes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # The parent decides when to stop, and may have been killed.
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGVTALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # Mostly the same one is asked for again: that of the job, or of the row whose second answer follows.
    read = lru_cache(maxsize=1)(_read)
    while True:
        try:
            criterion, answer = connection.recv()
        except EOFError:
            return
        try:
            check = read(criterion)
            connection.send(None if answer is None else _check_answer(check, answer, seconds))
        except StepFailure as failure:
            connection.send(failure if answer is None else failure.message)


def _read(criterion: Criterion) -> Check:
    """The criterion, compiled. Raises StepFailure if it cannot be used."""
    try:
        return _run_limited(criterion.compile, criterion.seconds_to_read)
    except TimeoutError as error:
        raise criterion.unusable(f"reading it takes more than {criterion.seconds_to_read:g} seconds") from error


def _check_answer(check: Check, answer: str, seconds: float) -> bool | str:
    """Whether the answer passes, or why that is unknown (perhaps not its fault)."""
    try:
        return _run_limited(lambda: check(answer), seconds)
    except _NOT_PASSED:
        return False
    except TimeoutError:
        return f"it took more than {seconds:g} seconds"
    except Exception as error:  # noqa: BLE001 - whatever the libraries raise is sent to the parent
        return f"{type(error).__name__}: {first_line(error)}"


def _run_limited(work: Callable[[], _Result], seconds: float) -> _Result:
    """The result. Raises TimeoutError after that much computing."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _late(_signal: int, _frame: object) -> NoReturn:
    raise TimeoutError


class AnswerChecker:
    """Checks answers one by one. A context manager, because it keeps a process."""

    def __init__(self, spec: ScoreSpec, *, seconds: float = SECONDS) -> None:
        self._exact, self._of_job = spec.check == "exactMatch", Criterion.of_job(spec)
        self._seconds = seconds
        self._worker: _Worker | None = None
        self._restarts = 0

    def __enter__(self) -> Self:
        """Start. Raises StepFailure BAD_CONFIGURATION for an unusable check of the job."""
        if not self._exact:
            self._worker = _Worker.start(self._seconds)
        if self._of_job is not None:
            try:
                self.require_usable(self._of_job)
            except StepFailure:
                self._stop()
                raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Stop."""
        self._stop()

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    def require_usable(self, criterion: Criterion) -> None:
        """Raise StepFailure for a pattern or schema that cannot be used."""
        if self._worker is None:
            raise AssertionError("an exact match has no criterion")
        problem = self._worker.ask(criterion)
        if problem is not None:
            raise criterion.unusable(problem.why) if isinstance(problem, _Ended) else problem

    def passes(self, answer: str, own: str, criterion: Criterion | None = None, *, begun: bool = False) -> bool:
        """Whether the answer passes. `own` is that of the row. Reasoning before either is skipped.

        An answer whose reasoning does not end has not passed. `begun`: whether the prompt has begun it. `criterion`:
        the row's, if the job has none. Raises its StepFailure if the checking process ends too often.
        """
        rest = after_reasoning(answer, begun=begun)
        if rest is None:
            return False
        if self._worker is None:
            return rest.strip() == own.rpartition(END_OF_REASONING)[2].strip()
        criterion = self._of_job or criterion
        if criterion is None:
            raise AssertionError("data whose rows bring no check were rejected when they were prepared")
        found = self._worker.ask(criterion, rest)
        if isinstance(found, bool):
            return found
        why = found.why if isinstance(found, _Ended) else found
        logger.warning("an answer could not be checked, and has not passed: %s", why)
        if isinstance(found, _Ended):
            self._restart(criterion, why)
        return False

    def _restart(self, criterion: Criterion, why: str) -> None:
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            raise criterion.unusable(f"with {self._restarts} answers it failed, the last time because {why}")
        self._stop()
        self._worker = _Worker.start(self._seconds)
