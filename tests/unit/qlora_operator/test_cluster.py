"""The calls to the API server that a unit test can answer."""

import asyncio
import json
from typing import Any

from qlora_api.naming import JOB_UID_LABEL
from qlora_operator.cluster import Cluster


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
    assert {query["limit"] for query in cluster.asked} == {"500"}
