"""kopf together with other work: what it leaves behind when it stops, and no more, ends."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import kopf
import pytest

from qlora_operator.watch import embedding
from qlora_operator.watch.embedding import keep_running
from qlora_operator.watch.resync import WatchMonitor
from tests.support.builders import VirtualLoop


async def forever() -> None:
    await asyncio.Event().wait()


STUBBORN = """
import asyncio, contextlib

async def stubborn():
    for _ in range(3):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
"""
"""A task that takes its first cancellations for those of another one."""


def test_a_dead_watch_ends_kopf_with_all_its_tasks_and_starts_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedding, "_FOLDER", tmp_path)
    kopfs: dict[str, Any] = {}
    exec(compile(STUBBORN, tmp_path / "reactor.py", "exec"), kopfs)
    monitor, started, signals = WatchMonitor(150), list[asyncio.Task[Any]](), list[int]()

    async def start() -> Collection[asyncio.Task[Any]]:
        started.append(asyncio.create_task(kopfs["stubborn"]()))
        root = asyncio.create_task(forever())
        started.append(root)
        return [root]

    async def scenario() -> None:
        other = asyncio.create_task(asyncio.sleep(1e6))
        running = asyncio.create_task(keep_running(start, monitor, lambda: signals.append(1), Path("none")))
        await asyncio.sleep(1)
        first = list(started)
        monitor.doubt("pods")
        await asyncio.sleep(60)
        assert all(task.done() for task in first)
        assert (len(started), len(signals), monitor.dead) == (4, 2, ())
        assert not other.done()
        running.cancel()
        await asyncio.wait([running])
        other.cancel()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


def test_a_task_of_kopf_is_found_by_its_code() -> None:
    async def scenario() -> None:
        own = asyncio.create_task(forever())
        roots = await kopf.spawn_tasks(registry=kopf.OperatorRegistry(), standalone=True, clusterwide=True)
        assert set(roots) <= embedding._tasks_of_kopf()
        await embedding._stop(roots)
        assert embedding._tasks_of_kopf() == set()
        assert not own.done()
        own.cancel()

    asyncio.run(scenario())
