"""Requests that name an adapter wait for one download, and a denied name costs nothing for a while."""

import asyncio
import threading
from pathlib import Path

import pytest

from qlora_api.channel import AdapterName
from qlora_cli.verification import NotVerified
from qlora_trainer.core.failures import unreachable
from qlora_vllm.resolver import MAX_REASONS, REJECTED_SECONDS, SECONDS_AGAIN, Resolver

NAME = f"team/bot@sha256:{'a' * 64}"


def test_requests_for_one_adapter_share_a_download(tmp_path: Path) -> None:
    begun, end = [], threading.Event()

    def provide(name: AdapterName) -> Path:
        begun.append(name)
        end.wait(60)
        return tmp_path

    async def ask() -> list[Path | None]:
        resolver = Resolver(provide)
        asking = [asyncio.create_task(resolver.resolve(NAME)) for _ in range(3)]
        await asyncio.sleep(0)
        # A client that goes away ends no download of others.
        asking[0].cancel()
        end.set()
        return list(await asyncio.gather(*asking[1:]))

    assert asyncio.run(ask()) == [tmp_path, tmp_path]
    assert begun == [AdapterName(namespace="team", job="bot", sha256="a" * 64)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotVerified("no signature is of this key"), "no signature is of this key"),
        (unreachable("the hub has no answer"), "the hub has no answer"),
        (OSError("disk full"), "disk full"),
        (TimeoutError("the volume has no answer"), "the volume has no answer"),
    ],
)
def test_a_denied_adapter_is_read_again_after_a_while(
    tmp_path: Path, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    now, attempts = [0.0], 0

    def provide(_: AdapterName) -> Path:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise error
        return tmp_path

    resolver = Resolver(provide, clock=lambda: now[0])
    for _ in range(3):
        assert asyncio.run(resolver.resolve(NAME)) is None
    assert (attempts, resolver.outcomes[NAME].reason) == (1, reason)
    assert reason in caplog.text
    now[0] = REJECTED_SECONDS if isinstance(error, NotVerified) else SECONDS_AGAIN
    assert asyncio.run(resolver.resolve(NAME)) == tmp_path
    assert resolver.outcomes[NAME].reason is None


def test_names_that_clients_invent_reach_no_store_and_fill_no_memory() -> None:
    def provide(_: AdapterName) -> Path:
        raise AssertionError("no such name is looked for")

    async def ask() -> Resolver:
        resolver = Resolver(provide)
        assert await resolver.resolve("../" * 1000) is None
        for number in range(MAX_REASONS + 10):
            resolver.record(f"team/bot@sha256:{number:064x}", "unavailable", "no record")
        return resolver

    outcomes = asyncio.run(ask()).outcomes
    assert len(outcomes) == MAX_REASONS
    assert "../" * 1000 not in outcomes


def test_a_slow_download_continues_after_its_request(tmp_path: Path) -> None:
    now, end = [0.0], threading.Event()

    def provide(_: AdapterName) -> Path:
        end.wait(60)
        return tmp_path

    async def ask() -> Path | None:
        resolver = Resolver(provide, clock=lambda: now[0])
        assert await resolver.resolve(NAME, seconds=0.01) is None
        assert resolver.outcomes[NAME].reason == "it is still being downloaded: ask again later"
        end.set()
        now[0] = SECONDS_AGAIN
        return await resolver.resolve(NAME)

    assert asyncio.run(ask()) == tmp_path
