"""Attachments of an artifact, in a registry where all users with push rights attach any content."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qlora_api.sources import RegistrySource, parse_source
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.stores.referrers import Attached, find_attached
from qlora_trainer.stores.registry import INDEX_TYPE, MANIFEST_TYPE, Registry, digest_of
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy

KIND = "application/vnd.in-toto+json"
ARTIFACT = f"sha256:{'a' * 64}"
DOCUMENT = b'{"stated": true}'
Layer = Mapping[str, Any]


class PlayedRegistry:
    """Answers with these manifests, referrers in `pages`, and their documents."""

    def __init__(self) -> None:
        self.pages: list[list[bytes]] = [[]]
        self.link: Callable[[int], str] = lambda page: f"</v2/team/adapter/referrers/{ARTIFACT}?page={page}>; rel=next"
        self.content = {DOCUMENT: digest_of(DOCUMENT)}

    def answer(self, request: Request) -> Fault:
        path, _, query = request.path.partition("?")
        if "/referrers/" in path:
            return self._page(int(query.partition("page=")[2] or 0))
        found = [content for content, digest in self.content.items() if path.endswith(digest)]
        return Fault(200, body=found[0]) if found else Fault(404)

    def _page(self, number: int) -> Fault:
        manifests = self.pages[number]
        self.content |= {manifest: digest_of(manifest) for manifest in manifests}
        entries = [
            {"mediaType": MANIFEST_TYPE, "artifactType": KIND, "digest": digest_of(manifest), "size": len(manifest)}
            for manifest in manifests
        ]
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()
        following = {"Link": self.link(number + 1)} if number + 1 < len(self.pages) else {}
        return Fault(200, headers=following, body=index)


def manifest(*layers: Layer, number: int = 0) -> bytes:
    return json.dumps({"schemaVersion": 2, "layers": layers, "annotations": {"number": str(number)}}).encode()


def layer(**changes: Any) -> Layer:
    return {"mediaType": KIND, "digest": digest_of(DOCUMENT), "size": len(DOCUMENT), **changes}


@pytest.fixture
def played() -> PlayedRegistry:
    return PlayedRegistry()


@pytest.fixture
def proxy(played: PlayedRegistry) -> Iterator[FaultProxy]:
    with serve_proxy(FaultProxy("", rule=played.answer)) as served:
        yield served


@pytest.fixture
def found(proxy: FaultProxy, tmp_path: Path) -> Callable[[], Attached]:
    """The documents that are attached to the artifact."""
    source = parse_source(f"oci://{proxy.address}/team/adapter:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(tmp_path, "spec.output.secretRef", None)
    registry = Registry(source, secret, allowed=(f"http://{proxy.address}",), reject=bad_configuration)
    return lambda: find_attached(registry, ARTIFACT, KIND)


@pytest.mark.parametrize(
    "foreign",
    [
        manifest(layer(size="abc")),
        manifest(layer(size=None)),
        manifest(layer(size=True)),
        manifest(layer(digest="../../other")),
        manifest(layer(digest=f"sha256:{'b' * 64}")),
        manifest(layer(size=2**40)),
        manifest(),
        json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}).encode(),
        b"no JSON",
    ],
)
def test_foreign_attachments_do_not_hide_the_statement(
    played: PlayedRegistry, found: Callable[[], Attached], foreign: bytes
) -> None:
    played.pages = [[foreign, manifest(layer())]]
    assert found() == Attached((DOCUMENT,), 2, is_all=True)


def test_the_statement_is_found_on_a_later_page(
    played: PlayedRegistry, proxy: FaultProxy, found: Callable[[], Attached]
) -> None:
    played.pages = [[manifest(number=1)], [manifest(number=2)], [manifest(layer())]]
    assert found() == Attached((DOCUMENT,), 3, is_all=True)
    assert proxy.lines("GET")[0].endswith("?artifactType=application%2Fvnd.in-toto%2Bjson")


def test_pages_are_read_from_the_registry_only_and_not_without_end(
    played: PlayedRegistry, proxy: FaultProxy, found: Callable[[], Attached]
) -> None:
    """Unread attachments are reported: the statement may be among them."""
    played.pages = [[manifest(number=number)] for number in range(100)]
    assert found() == Attached((), 20, is_all=False)
    assert sum("/referrers/" in path for path in proxy.lines("GET")) == 20
    with serve_proxy(FaultProxy("", rule=played.answer)) as elsewhere:
        played.link = lambda page: f"<http://{elsewhere.address}/v2/x/referrers/{ARTIFACT}?page={page}>; rel=next"
        assert found() == Attached((), 1, is_all=False)
        assert elsewhere.seen == []
