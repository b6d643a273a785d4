"""Notes the tasks that somebody else's code starts, so that all of them can be ended, and no others."""

import asyncio
from collections.abc import Collection, Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

Task = asyncio.Task[Any]
Tasks = dict[Task, None]
"""The tasks that run, the oldest first."""

_Coroutine = Coroutine[Any, Any, Any] | Generator[Any, None, Any]
_ROUNDS = 100
_PAUSE_SECONDS = 0.1

_scope: ContextVar[Tasks | None] = ContextVar("_scope", default=None)


@contextmanager
def task_scope() -> Iterator[Tasks]:
    """Gives the tasks that the block starts, itself or through its tasks, also those that they start later."""
    asyncio.get_running_loop().set_task_factory(_start)
    inside: Tasks = {}
    token = _scope.set(inside)
    try:
        yield inside
    finally:
        _scope.reset(token)


async def end_all(roots: Collection[Task], inside: Tasks, patience: float) -> None:
    """Cancel the roots, which may end the others; after `patience` seconds cancel what is left, until nothing is."""
    for task in roots:
        task.cancel()
    if roots:
        await asyncio.wait(roots, timeout=patience)
    for _ in range(_ROUNDS):
        if not inside:
            return
        # The oldest first, and not all at once: a task that waits for another one takes its own cancellation for the
        # other's, and goes on.
        for task in tuple(inside):
            task.cancel()
            await asyncio.sleep(0)
        if inside:
            await asyncio.wait(inside, timeout=_PAUSE_SECONDS)


def _start(loop: asyncio.AbstractEventLoop, coroutine: _Coroutine, /, **options: Any) -> Task:
    task = asyncio.Task(coroutine, loop=loop, **options)
    # A task starts with a copy of its starter's context, so that the tasks of its tasks are noted too.
    inside = _scope.get()
    if inside is not None:
        inside[task] = None
        task.add_done_callback(partial(_end, inside))
    return task


def _end(inside: Tasks, task: Task) -> None:
    inside.pop(task, None)
    if not task.cancelled():
        # Of tasks that fail together one is looked at, and asyncio would log a traceback for each of the others.
        task.exception()
