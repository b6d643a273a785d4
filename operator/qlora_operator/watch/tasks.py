"""Tracks the tasks that a library starts, to end all of them and no others."""

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
    """Yield the tasks that the block starts, also through its tasks, also later."""
    asyncio.get_running_loop().set_task_factory(_start)
    inside: Tasks = {}
    token = _scope.set(inside)
    try:
        yield inside
    finally:
        _scope.reset(token)


async def end_all(roots: Collection[Task], inside: Tasks, patience: float) -> None:
    """Cancel the roots, which may end the others, after `patience` seconds the rest.

    That repeats until none is left.
    """
    for task in roots:
        task.cancel()
    if roots:
        await asyncio.wait(roots, timeout=patience)
    for _ in range(_ROUNDS):
        if not inside:
            return
        # The oldest first, one by one: a task that waits for another one mistakes the other's cancellation for its own,
        # and continues.
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
        # Of tasks that fail together one is read, and asyncio would log a traceback for each of the others.
        task.exception()
