"""Ending the tasks that other code has started, and no others."""

import asyncio
import contextlib

from qlora_operator.watch.tasks import Tasks, end_all, task_scope


async def forever() -> None:
    await asyncio.Event().wait()


def test_only_tasks_started_inside_end() -> None:
    async def scenario() -> None:
        async def root() -> None:
            await asyncio.sleep(0)
            asyncio.create_task(forever())  # noqa: RUF006 - nobody keeps it, as in kopf
            await forever()

        outside = asyncio.create_task(forever())
        with task_scope() as inside:
            started = asyncio.create_task(root())
        later = asyncio.create_task(forever())
        await asyncio.sleep(0.01)
        assert len(inside) == 2
        await end_all({started}, inside, 1)
        assert not inside
        assert not outside.done()
        assert not later.done()
        outside.cancel()
        later.cancel()

    asyncio.run(scenario())


def test_a_task_that_ignores_its_cancellation_a_few_times_ends_too() -> None:
    async def scenario() -> None:
        async def stubborn() -> None:
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await forever()

        with task_scope() as inside:
            started = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        await end_all({started}, inside, 0.01)
        assert started.done()

    asyncio.run(scenario())


def test_errors_of_unawaited_tasks_are_not_reported_twice() -> None:
    async def scenario() -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))

        async def fails() -> None:
            raise ValueError("known")

        inside: Tasks
        with task_scope() as inside:
            asyncio.create_task(fails())  # noqa: RUF006 - nobody keeps it, as in kopf
        await asyncio.sleep(0.01)
        assert not inside
        assert reported == []

    asyncio.run(scenario())
