"""The calls to the API server that a unit test can answer."""

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL
from qlora_operator.cluster import (
    AlreadyExistsError,
    Cluster,
    ClusterError,
    ConflictError,
    NotFoundError,
    RejectedError,
    UnavailableError,
)
from qlora_operator.transport import Query, Transport


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
        return json.dumps({"metadata": metadata, "items": [{"metadata": {"name": f"pod-{number}"}}]}).encode()


def test_a_list_is_read_to_its_last_page() -> None:
    cluster = Pages()
    pods = asyncio.run(cluster.list_pods("team", "uid"))
    assert pods.version == "5"
    assert [pod["metadata"]["name"] for pod in pods.items] == ["pod-1", "pod-2", "pod-3"]
    assert [query.get("continue") for query in cluster.asked] == [None, "page-2", "page-3"]
    assert {query["labelSelector"] for query in cluster.asked} == {f"{JOB_UID_LABEL}=uid"}


def test_who_is_counted_is_read_page_by_page_and_without_those_that_have_ended() -> None:
    cluster = Pages()

    async def first_page() -> list[Any]:
        return [await anext(cluster.unfinished_pages("team"))]

    assert len(asyncio.run(first_page())) == len(cluster.asked) == 1
    assert cluster.asked[0]["fieldSelector"] == "status.phase!=Succeeded,status.phase!=Failed"


class Crowded(Transport):
    """A server with a thousand pods, each with as many notes of its writers as a real one."""

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


async def _names_in_versions(cluster: Cluster) -> list[str]:
    found, _ = await cluster.list_versions("pods", None)
    return [each.name for each in found]


async def _names_in_full(cluster: Cluster) -> list[str]:
    return [body["metadata"]["name"] async for page in cluster.pages("pods", None) for body in page]


@pytest.mark.parametrize("names", [_names_in_versions, _names_in_full])
def test_a_list_of_a_thousand_pods_takes_a_few_mebibytes(names: Callable[[Cluster], Awaitable[list[str]]]) -> None:
    async def listed() -> list[str]:
        return await names(Cluster(Crowded()))

    tracemalloc.start()
    try:
        assert asyncio.run(listed()) == [f"pod-{number}" for number in range(1000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


class Answering(Transport):
    """Answers every request with one status and message."""

    def __init__(self, status: int, message: str, reason: str = "") -> None:
        self._status, self._message, self._reason = status, message, reason

    async def send(self, method: str, path: str, **_: Any) -> tuple[int, bytes]:
        return self._status, json.dumps({"message": self._message, "reason": self._reason}).encode()


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
        asyncio.run(Cluster(Answering(status, message)).create_job("team", {}))
    assert type(raised.value) is error


QUOTA = 'Operation cannot be fulfilled on resourcequotas "team": the object has been modified'


@pytest.mark.parametrize(
    ("reason", "message", "error"),
    [("AlreadyExists", "already exists", AlreadyExistsError), ("Conflict", QUOTA, ConflictError)],
)
def test_only_a_conflict_that_says_so_means_that_the_object_exists(
    reason: str, message: str, error: type[ClusterError]
) -> None:
    with pytest.raises(ConflictError, match=r"already|Operation") as raised:
        asyncio.run(Cluster(Answering(409, message, reason)).create_service("team", {}))
    assert type(raised.value) is error


class Foreign(Transport):
    """What stands between the operator and the API server answers in its place."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = status, body

    async def send(self, method: str, path: str, **_: Any) -> tuple[int, bytes]:
        return self._answer


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
    ],
)
def test_an_answer_that_is_not_the_api_servers_is_an_error_like_any_other(status: int, body: bytes, found: str) -> None:
    cluster = Cluster(Foreign(status, body))

    async def versions() -> None:
        await cluster.list_versions("jobs", None)

    for call in (cluster.check_list("jobs", None), versions(), cluster.get_lease("team", "operator")):
        with pytest.raises(UnavailableError, match=found):
            asyncio.run(call)


def test_a_schema_is_an_object_without_metadata() -> None:
    assert asyncio.run(Cluster(Foreign(200, b'{"openapi": "3.0.0"}')).get_schema()) == {"openapi": "3.0.0"}
    with pytest.raises(UnavailableError, match="not JSON"):
        asyncio.run(Cluster(Foreign(200, b"<html>")).get_schema())
