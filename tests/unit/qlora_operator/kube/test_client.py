"""The calls to the API server that a unit test can answer."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from qlora_api.naming import JOB_UID_LABEL
from qlora_operator.kube import api
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import (
    AlreadyExistsError,
    ClusterError,
    ConflictError,
    NotFoundError,
    RejectedError,
    UnavailableError,
)
from qlora_operator.kube.listing import OBJECTS_PER_PAGE
from qlora_operator.kube.transport import Query, TooLongError, Transport
from tests.support.builders import NAME, UID, child, job_body, pod


class Pages(Cluster):
    """A cluster whose lists take three pages."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.asked: list[dict[str, str]] = []

    async def _request(self, method: str, path: str, **request: Any) -> bytes:
        query = dict(request["query"])
        self.asked.append(query)
        number = int(query.get("continue", "page-1").removeprefix("page-"))
        metadata = {"resourceVersion": "5"} | ({"continue": f"page-{number + 1}"} if number < 3 else {})
        body = pod("train", number=number) | {"status": {"conditions": [], "phase": "Running"}}
        return json.dumps({"metadata": metadata, "items": [body]}).encode()


def test_a_list_is_read_to_its_last_page() -> None:
    cluster = Pages()
    pods = asyncio.run(cluster.list_pods("team", "uid"))
    assert pods.version == "5"
    assert [pod.uid.removeprefix(f"uid-{NAME}-train-1-") for pod in pods.items] == ["pod1", "pod2", "pod3"]
    assert [query.get("continue") for query in cluster.asked] == [None, "page-2", "page-3"]
    assert {query["labelSelector"] for query in cluster.asked} == {f"{JOB_UID_LABEL}=uid"}


def test_counted_jobs_are_read_page_by_page_without_ended_ones() -> None:
    cluster = Pages()

    async def first_page() -> list[Any]:
        return [await anext(cluster.profiles_in_use("team"))]

    assert len(asyncio.run(first_page())) == len(cluster.asked) == 1
    assert cluster.asked[0]["fieldSelector"] == "status.phase!=Succeeded,status.phase!=Failed"


class Crowded(Transport):
    """A server with a thousand pods, with as many managed fields as real ones."""

    def __init__(self) -> None:
        notes = {f"f:field-{number}": {"f:value": dict[str, Any]()} for number in range(120)}
        metadata = {"namespace": "team", "resourceVersion": "5", "managedFields": [{"fieldsV1": {"f:spec": notes}}]}
        self._metadata = json.dumps(metadata).removesuffix("}")

    async def send(self, method: str, path: str, *, query: Query | None = None, **_: Any) -> tuple[int, bytes]:
        asked = dict(query or ())
        first = int(asked.get("continue", 0))
        end = min(first + int(asked["limit"]), 1000)
        more = f', "continue": "{end}"' if end < 1000 else ""
        items = ",".join(
            f'{{"metadata": {self._metadata}, "name": "pod-{number}", "uid": "{number}"}}}}'
            for number in range(first, end)
        )
        return 200, f'{{"metadata": {{"resourceVersion": "5"{more}}}, "items": [{items}]}}'.encode()


def test_the_versions_of_a_thousand_pods_take_a_few_mebibytes() -> None:
    async def listed() -> list[str]:
        found, _ = await Cluster(Crowded()).list_versions("pods", None)
        return [each.name for each in found]

    tracemalloc.start()
    try:
        assert asyncio.run(listed()) == [f"pod-{number}" for number in range(1000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_list_whose_token_expires_goes_on_and_keeps_its_first_version() -> None:
    class Forgetful(Transport):
        """A server of 1,200 QLoRAJobs that rejects each token but those that it then offers."""

        def __init__(self) -> None:
            self.asked: list[str] = []

        async def send(self, method: str, path: str, *, query: Query | None = None, **_: Any) -> tuple[int, bytes]:
            token = dict(query or ()).get("continue", "")
            self.asked.append(token)
            if token and not token.startswith("inconsistent"):
                answer = {"code": 410, "reason": "Expired", "metadata": {"continue": f"inconsistent-{token}"}}
                return 410, json.dumps(answer).encode()
            first = int(token.rpartition("-")[2] or 0)
            end = min(first + 500, 1200)
            version = "9" if token else "5"
            metadata = {"resourceVersion": version} | ({"continue": str(end)} if end < 1200 else {})
            names = {"namespace": "team", "resourceVersion": "3"}
            items = [{"metadata": names | {"name": f"a-{n}", "uid": str(n)}} for n in range(first, end)]
            return 200, json.dumps({"metadata": metadata, "items": items}).encode()

    server = Forgetful()
    found, version = asyncio.run(Cluster(server).list_versions("qlorajobs", None))
    assert [each.uid for each in found] == [str(number) for number in range(1200)]
    assert version == "5"
    assert server.asked == ["", "500", "inconsistent-500", "1000", "inconsistent-1000"]


def test_a_list_whose_offered_token_has_expired_too_is_given_up() -> None:
    class Broken(Transport):
        def __init__(self) -> None:
            self.asked = 0

        async def send(self, method: str, path: str, **_: Any) -> tuple[int, bytes]:
            self.asked += 1
            return 410, b'{"metadata": {"continue": "again"}}'

    server = Broken()
    with pytest.raises(UnavailableError, match="/qlorajobs"):
        asyncio.run(Cluster(server).list_versions("qlorajobs", None))
    assert server.asked == 2


class Busy(Transport):
    """A server with objects of these sizes in bytes: pods, Jobs and QLoRAJobs."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes
        self.limits: list[int] = []
        self.longest = 0
        self.most_at_a_time = 0
        self._at_a_time = 0

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        most: int | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
        **_: Any,
    ) -> tuple[int, bytes]:
        await self.prepare(path)
        async with turn or nullcontext():
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
            await asyncio.sleep(0)
            self._at_a_time -= 1
        asked = dict(query or ())
        first, limit = int(asked.get("continue", 0)), int(asked["limit"])
        self.limits.append(limit)
        kind = path.rpartition("/")[2]
        items = [self._object(kind, number) for number in range(len(self._sizes))[first : first + limit]]
        more = {"continue": str(first + limit)} if first + limit < len(self._sizes) else {}
        content = json.dumps({"metadata": {"resourceVersion": "5"} | more, "items": items}).encode()
        if most is not None and len(content) > most:
            raise TooLongError
        self.longest = max(self.longest, len(content))
        return 200, content

    async def prepare(self, path: str) -> None:
        """Take the time that the server needs before it answers."""

    def _object(self, kind: str, number: int) -> dict[str, Any]:
        body = job_body() if kind == "qlorajobs" else child("train") if kind == "jobs" else pod("train", number=number)
        return body | {"metadata": body["metadata"] | {"name": f"{number}"}, "spec": {"x": "x" * self._sizes[number]}}


def test_only_pages_of_large_objects_are_requested_in_parts() -> None:
    server = Busy([10] * 10 + [1_500_000] * 6 + [5_000_000] + [10] * 200)
    cluster = Cluster(server)
    pods = asyncio.run(cluster.list_pods("team", "uid"))
    assert [each.value.name for each in pods.items if each.value] == [str(number) for number in range(217)]
    assert server.longest < 6_000_000
    assert server.limits[-1] == OBJECTS_PER_PAGE
    assert len(server.limits) < 30


def test_parallel_lists_hold_one_parsed_page_and_two_in_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Body(dict[str, Any]):
        """Unlike a dict, it can be watched, and found by its identity."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    alive, most = WeakSet[Body](), 0

    def watched(content: dict[str, Any]) -> dict[str, Any]:
        nonlocal most
        if "spec" not in content:
            return content
        body = Body(content)
        alive.add(body)
        most = max(most, len(alive))
        return body

    loads = partial(json.loads, object_hook=watched)
    monkeypatch.setattr(api, "json", SimpleNamespace(loads=loads))
    server = Busy([10] * 100)

    async def count(pages: AsyncIterator[Sequence[Any]]) -> int:
        return sum([len(page) async for page in pages])

    async def read() -> list[Any]:
        cluster = Cluster(server)
        return await asyncio.gather(
            *(cluster.list_pods("team", UID) for _ in range(7)),
            *(cluster.list_jobs("team", UID) for _ in range(7)),
            cluster.list_pods_of_child("team", "uid"),
            *(count(cluster.profiles_in_use("team")) for _ in range(3)),
            cluster.list_versions("qlorajobs", None),
        )

    found = asyncio.run(read())
    assert len(found[0].items) == len(found[7].items) == found[15] == 100
    assert most <= OBJECTS_PER_PAGE
    assert server.most_at_a_time <= 2


def test_slow_lists_do_not_delay_other_lists() -> None:
    class Slow(Busy):
        async def prepare(self, path: str) -> None:
            if "/slow/" in path:
                await asyncio.Event().wait()

    async def read() -> int:
        cluster = Cluster(Slow([10] * 3))
        waiting = [asyncio.create_task(cluster.list_pods("slow", UID)) for _ in range(14)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            found = await cluster.list_pods("team", UID)
        for task in waiting:
            task.cancel()
        return len(found.items)

    assert asyncio.run(read()) == 3


def test_of_many_workloads_one_is_read() -> None:
    server = Busy([10] * 100)
    assert asyncio.run(Cluster(server).find_workload("team", "uid"))
    assert server.limits == [1]


class Answering(Transport):
    """Answers every request with one status and body, as the API server or a proxy before it."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = status, body

    async def send(self, method: str, path: str, **_: Any) -> tuple[int, bytes]:
        return self._answer


def failing(status: int, message: str, reason: str = "") -> Cluster:
    """An API server that fails with this message."""
    return Cluster(Answering(status, json.dumps({"message": message, "reason": reason}).encode()))


WEBHOOK = 'Internal error occurred: failed calling webhook "mjob.kb.io": failed to call webhook: connection refused'


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (500, WEBHOOK, RejectedError),
        (500, "etcdserver: request timed out", UnavailableError),
        (404, "not found", NotFoundError),
    ],
)
def test_a_webhook_that_does_not_answer_rejects_and_a_server_that_fails_does_not(
    status: int, message: str, error: type[ClusterError]
) -> None:
    with pytest.raises(ClusterError, match=message) as raised:
        asyncio.run(failing(status, message).create_job("team", {}))
    assert type(raised.value) is error


QUOTA = 'Operation cannot be fulfilled on resourcequotas "team": the object has been modified'


@pytest.mark.parametrize(
    ("reason", "message", "error"),
    [("AlreadyExists", "already exists", AlreadyExistsError), ("Conflict", QUOTA, ConflictError)],
)
def test_only_a_conflict_with_that_reason_means_that_the_object_exists(
    reason: str, message: str, error: type[ClusterError]
) -> None:
    with pytest.raises(ConflictError, match=r"already|Operation") as raised:
        asyncio.run(failing(409, message, reason).create_service("team", {}))
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (302, b"", "status 302"),
        (301, b"<html>moved</html>", "status 301: <html>moved</html>"),
        (200, b"<html>log in</html>", "not JSON: '<html>log in</html>'"),
        (200, b"", "not JSON"),
        (200, b'"ok"', "no object"),
        (200, b"null", "no object"),
        (200, b'{"login": "https://login.example.org"}', "without metadata"),
        (200, b'{"metadata": null}', "without metadata"),
        (503, b'["busy"]', "status 503"),
        (410, b'{"metadata": "moved"}', "/apis"),
    ],
)
def test_an_answer_that_is_not_the_api_servers_is_an_error_like_any_other(status: int, body: bytes, found: str) -> None:
    cluster = Cluster(Answering(status, body))

    async def versions() -> None:
        await cluster.list_versions("jobs", None)

    for call in (cluster.check_list("jobs", None), versions(), cluster.get_lease("team", "operator")):
        with pytest.raises(UnavailableError, match=found):
            asyncio.run(call)


def test_a_schema_is_an_object_without_metadata() -> None:
    assert asyncio.run(Cluster(Answering(200, b'{"openapi": "3.0.0"}')).get_schema()) == {"openapi": "3.0.0"}
    with pytest.raises(UnavailableError, match="not JSON"):
        asyncio.run(Cluster(Answering(200, b"<html>")).get_schema())
