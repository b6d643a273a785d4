"""Runs kopf together with other work in one process, which kopf has no settings for.

kopf takes an operator for the whole process: it handles the process's signals, ends at answers of the API server that
an administrator has to cure (401, 404, an error in a stream), reads the authority of the server's certificate once,
and stops without a limit of time. Here it starts again after any end, and the signals stay with the process.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import kopf

from qlora_operator.watch.resync import WatchMonitor

logger = logging.getLogger(__name__)

Task = asyncio.Task[Any]

# Seconds between requests that fail. kopf's own list of them has an end, and kopf ends with it.
_GROWING = (1, 1, 2, 3, 5, 8)
_LONGEST_PAUSE = 10
# A watch that has worked for so long has not failed immediately.
_STEADY_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_STOP_SECONDS = 3.0
_ROUNDS, _PAUSE_SECONDS = 100, 0.1
_FOLDER = Path(kopf.__file__).parent


class NotStoppedError(Exception):
    """Tasks of kopf run on although they were canceled: only a new process ends them."""


class EndlessPauses(Iterable[float]):
    """Pauses that grow to a limit and never end.

    They have no length, so that kopf does not count its tries.
    """

    def __iter__(self) -> Iterator[float]:
        return itertools.chain(_GROWING, itertools.repeat(_LONGEST_PAUSE))


class NoDifferences(kopf.DiffBaseStorage):
    """Keeps no copy of an object: no handler asks for differences."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """Return nothing to compare."""
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        """Return no earlier state."""

    def store(self, **_: Any) -> None:
        """Store nothing."""


class NoProgress(kopf.ProgressStorage):
    """Keeps no progress of handlers: those of events are called once."""

    def fetch(self, **_: Any) -> None:
        """Return no progress."""

    def store(self, **_: Any) -> None:
        """Store nothing."""

    def purge(self, **_: Any) -> None:
        """Purge nothing."""

    def touch(self, **_: Any) -> None:
        """Touch nothing."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        """Return the essence as it is."""
        return essence


async def keep_running(
    start: Callable[[], Awaitable[Collection[Task]]],
    monitor: WatchMonitor,
    take_signals: Callable[[], None],
    authority: Path,
) -> None:
    """Run kopf until canceled, with pauses of at most ten seconds between its ends.

    `start`: spawns kopf's root tasks. `take_signals`: called after that, as kopf takes the process's signals whenever
    it starts. `authority`: file of the trusted certificates, if it exists. Raises NotStoppedError.
    """
    loop = asyncio.get_running_loop()
    pauses, said = iter(EndlessPauses()), set[str]()
    while True:
        began = loop.time()
        try:
            await _run_once(start, monitor, take_signals, authority)
            reason = "a watch is dead"
        except NotStoppedError:
            raise
        except Exception as error:  # noqa: BLE001 - kopf's errors have no common class, and none may end the process
            reason = _explain(error)
        if loop.time() - began > _STEADY_SECONDS:
            pauses, said = iter(EndlessPauses()), set()
        if reason not in said:
            logger.warning("the watches have ended and start again: %s", reason)
            said.add(reason)
        monitor.start_again()
        await asyncio.sleep(next(pauses))


def _explain(error: Exception) -> str:
    if isinstance(error, kopf.LoginError):
        return "the API server rejects the operator's credentials"
    # kopf's errors of the API server have the server's sentence, and then its whole answer.
    return f"{type(error).__name__}: {error.args[0] if error.args else ''}"


async def _run_once(
    start: Callable[[], Awaitable[Collection[Task]]],
    monitor: WatchMonitor,
    take_signals: Callable[[], None],
    authority: Path,
) -> None:
    """Run kopf until a watch is found dead, or the trusted authority is replaced.

    Raises the error that ends kopf.
    """
    trusted, roots = _read(authority), list[Task]()
    try:
        roots += await start()
        take_signals()
        while not monitor.dead:
            ended, _ = await asyncio.wait(roots, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                if not task.cancelled():
                    task.result()
            if ended:
                raise RuntimeError("kopf has ended without an error")
            if _read(authority) != trusted:
                # kopf has read it when it started, and would try for ever what it cannot verify.
                raise RuntimeError("the authority of the API server's certificate has been replaced")
    finally:
        await _stop(roots)


def _read(file: Path) -> bytes:
    """Read the certificates that a pod trusts, renewed by the kubelet, if in a pod."""
    return file.read_bytes() if file.exists() else b""


async def _stop(roots: Collection[Task]) -> None:
    """Cancel kopf's root tasks, which end the others, and then those that they leave.

    Raises NotStoppedError.
    """
    for task in roots:
        task.cancel()
    if roots:  # it may have been canceled while it started
        await asyncio.wait(roots, timeout=_STOP_SECONDS)
    for _ in range(_ROUNDS):
        left = _tasks_of_kopf()
        if not left:
            break
        # Again and again: a task that waits for another one may take a cancellation for the other's, and continue.
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=_PAUSE_SECONDS)
    else:
        raise NotStoppedError(f"kopf's task {next(iter(left)).get_name()!r} has not ended")
    for task in roots:
        if not task.cancelled():
            # Of tasks that fail together one is read, and asyncio would log a traceback for each of the others.
            task.exception()


def _tasks_of_kopf() -> set[Task]:
    """Return the tasks that run kopf's code, of every start."""
    return {task for task in asyncio.all_tasks() if _FOLDER in _file(task).parents}


def _file(task: Task) -> Path:
    code = getattr(task.get_coro(), "cr_code", None)
    return Path(code.co_filename if code is not None else "")
