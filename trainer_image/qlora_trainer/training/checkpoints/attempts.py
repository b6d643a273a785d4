"""Records the train step's attempts: at most one runs at a time, none after too many without a checkpoint.

The number of interruptions is not limited here: a pod cannot distinguish an eviction from a suspension.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qlora_api.contract import ExitCode
from qlora_api.schema import ObservedModel, replace
from qlora_api.status import Timestamp
from qlora_trainer.core.failures import Interrupted, StepFailure, unreachable
from qlora_trainer.core.filesystem import write_atomically

ATTEMPTS_FILE = "attempts.jsonl"
LOCK_FILE = "train.lock"
MAX_ATTEMPTS_WITHOUT_PROGRESS = 5
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PodOfJob:
    """The pod that runs an attempt."""

    uid: str
    job_attempt: int
    """Number of the step's Job, from 1, or 0 in the Job of another job."""
    started: datetime
    """When its trainer started."""


class Attempt(ObservedModel):
    """One start of the train step."""

    pod_uid: str
    started_at: Timestamp
    from_step: int
    """Step of the checkpoint that it resumed from, or 0 without one."""
    job_attempt: int = 0
    """Number of the step's Job, or 0 in another job's or from an earlier release."""
    ended: Literal["succeeded", "interrupted", "failed"] | None = None
    """None if it was killed before it could record its end."""
    ended_at: Timestamp | None = None
    """Of an attempt that was killed, its last sign of life. None while it runs."""
    trained_at: Timestamp | None = None
    """When it began to train, or None before, or from an earlier release."""
    saved_at: Timestamp | None = None
    """When it saved its latest checkpoint, or None before the first."""


def reject_if_stuck(attempts: Sequence[Attempt], from_step: int, job_attempt: int) -> None:
    """Raise StepFailure (RETRIES_EXHAUSTED) if the latest attempts of this Job were all killed at the same checkpoint.

    `from_step`: step of the checkpoint that the next attempt would resume from. An attempt that was asked to stop has
    saved a checkpoint and does not count, nor does one of an earlier Job: a resumed job starts afresh. On several nodes
    each attempt has a separate Job, and only the operator's limits apply. In the Job of another one (`job_attempt` 0)
    nothing counts: it cannot be distinguished from that one's earlier Jobs, and that job's attempts do count.
    """
    if job_attempt == 0:
        return
    recent = [attempt for attempt in attempts if attempt.job_attempt == job_attempt][-MAX_ATTEMPTS_WITHOUT_PROGRESS:]
    stuck = [attempt for attempt in recent if attempt.ended is None and attempt.from_step == from_step]
    if len(stuck) == MAX_ATTEMPTS_WITHOUT_PROGRESS:
        raise StepFailure(
            ExitCode.RETRIES_EXHAUSTED,
            f"{len(stuck)} attempts in a row were killed before a checkpoint after step {from_step}: give the pod more "
            "memory or time to stop, and set a new spec.retry.request; or create the job again with a lower "
            "spec.training.saveEverySteps",
        )


@contextmanager
def recorded_attempt(records: Path, from_step: int, pod: PodOfJob, now: Callable[[], datetime]) -> Iterator[None]:
    """Run the body as one more attempt, which is recorded before it starts and again when it ends.

    Raises StepFailure (RETRIES_EXHAUSTED) instead if it would be stuck too, OSError if the record cannot be written.
    An exception of the body takes precedence.
    """
    earlier = ended_attempts(records)
    reject_if_stuck(earlier, from_step, pod.job_attempt)
    attempt = Attempt(
        pod_uid=pod.uid, job_attempt=pod.job_attempt, started_at=_precise(pod.started), from_step=from_step
    )
    with _noting_end(records, earlier, attempt, now):
        yield


@contextmanager
def reopened_attempt(records: Path, pod_uid: str, now: Callable[[], datetime]) -> Iterator[None]:
    """Extend this pod's ended attempt over the body, if it is still the latest."""
    attempts = read_attempts(records)
    if not attempts or attempts[-1].pod_uid != pod_uid:
        yield
        return
    *earlier, attempt = attempts
    with _noting_end(records, earlier, replace(attempt, ended=None, ended_at=None), now):
        yield


@contextmanager
def _noting_end(
    records: Path, earlier: Sequence[Attempt], attempt: Attempt, now: Callable[[], datetime]
) -> Iterator[None]:
    """Record the attempt as one that runs and, when the body ends, how it has ended."""

    def note(ended: Literal["succeeded", "interrupted", "failed"]) -> None:
        latest = _latest_of(records, attempt.pod_uid) or attempt
        write_attempts(records, [*earlier, replace(latest, ended=ended, ended_at=_precise(now()))])

    write_attempts(records, [*earlier, attempt])
    try:
        yield
    except BaseException as error:
        try:
            note("interrupted" if isinstance(error, Interrupted) else "failed")
        except OSError:
            # The body's exception decides the exit code. An attempt without a recorded end counts as killed.
            logger.exception("the end of this attempt cannot be recorded in %s", ATTEMPTS_FILE)
        raise
    note("succeeded")


def note_time(records: Path, pod_uid: str, name: Literal["trained_at", "saved_at"], now: datetime) -> None:
    """Note when the pod's attempt began to train, or saved, if there is room for that."""
    time = _precise(now)
    # A full volume, or a deleted file, must not end the run: then nothing is recorded.
    try:
        latest = _latest_of(records, pod_uid)
        if latest is not None:
            changed = replace(latest, trained_at=time) if name == "trained_at" else replace(latest, saved_at=time)
            write_attempts(records, [*read_attempts(records)[:-1], changed])
    except OSError as error:
        logger.warning("the attempt's time is not recorded: %s", error)


def _latest_of(records: Path, pod_uid: str) -> Attempt | None:
    """The latest attempt, if that is the pod's and has not ended."""
    attempts = read_attempts(records)
    return attempts[-1] if attempts and attempts[-1].pod_uid == pod_uid and attempts[-1].ended is None else None


def _precise(time: datetime) -> str:
    """RFC 3339 in UTC with milliseconds, since times are subtracted."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def show_life(records: Path) -> None:
    """Touch the attempt's record, in case it cannot record its end. Raises OSError."""
    # Not os.utime: the run must survive a deleted file.
    (records / ATTEMPTS_FILE).touch()


def ended_attempts(records: Path) -> list[Attempt]:
    """All attempts while none runs. A killed one ended at its last sign of life."""
    attempts = read_attempts(records)
    if not attempts or attempts[-1].ended_at is not None:
        return list(attempts)
    seen = datetime.fromtimestamp((records / ATTEMPTS_FILE).stat().st_mtime, UTC)
    return [*attempts[:-1], replace(attempts[-1], ended_at=_precise(seen))]


def read_attempts(records: Path) -> list[Attempt]:
    """All attempts, oldest first. A line that cannot be read is logged and left out."""
    attempts = []
    try:
        lines = (records / ATTEMPTS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, start=1):
        try:
            attempts.append(Attempt.model_validate_json(line))
        except ValidationError as error:
            kind = error.errors(include_input=False)[0]["type"]
            logger.warning("%s:%d is not a record of an attempt and is ignored: %s", ATTEMPTS_FILE, number, kind)
    return attempts


def write_attempts(records: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the file with `attempts`, one line each."""
    lines = [json.dumps(attempt.dump(), sort_keys=True) + "\n" for attempt in attempts]
    write_atomically(records / ATTEMPTS_FILE, "".join(lines).encode())


@contextmanager
def only_attempt(records: Path) -> Iterator[None]:
    """Hold the workspace's lock. Raises StepFailure (retryable) while another process trains in it.

    Kubernetes may start the same pod twice, and a pod on a lost node may still run. The lock ends with its process.
    """
    records.mkdir(parents=True, exist_ok=True)
    with (records / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise unreachable(
                "another attempt is still training in this workspace; this one stops, so that only one of them writes"
            ) from held
        yield
