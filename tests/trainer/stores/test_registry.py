"""Downloads from a registry: whole, resumed, and without credentials for other hosts."""

import random
from pathlib import Path

import pytest

from qlora_api.contract import ExitCode
from qlora_api.sources import RegistrySource, parse_source
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.stores.registry import Blob, Registry, digest_of
from tests.support.failures import failing
from tests.support.servers import LOGIN, give_login
from tests.support.services.fault_proxy import Fault, FaultProxy, serve_proxy


def opened(registry_proxy: FaultProxy, folder: Path) -> Registry:
    """A repository of the registry that the proxy plays."""
    source = parse_source(f"oci://{registry_proxy.address}/team/tiny:v1")
    assert isinstance(source, RegistrySource)
    secret = Secret(folder, "spec.model.secretRef", None)
    return Registry(source, secret, allowed=(f"http://{registry_proxy.address}",), reject=bad_configuration)


def test_a_small_blob_with_another_content_than_its_digest_is_rejected(tmp_path: Path) -> None:
    """A registry, or a proxy in front of it, may serve a file of the same size."""
    expected = b'{"rank": 4}'
    blob = Blob(digest_of(expected), len(expected))
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(200, body=expected))) as registry_proxy:
        assert opened(registry_proxy, tmp_path).read(blob) == expected
        registry_proxy.rule = lambda _request: Fault(200, body=b'{"rank": 8}')
        with failing(ExitCode.UNSAFE_ARTIFACT, f"{blob.digest} has content that does not match its digest"):
            opened(registry_proxy, tmp_path).read(blob)


def test_a_download_resumes_from_a_server_without_ranges(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(300_000)
    blob, path = Blob(digest_of(content), len(content)), tmp_path / "model.safetensors"
    arrived: list[int] = []
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(200, body=content, cut=200_000))) as registry_proxy:
        with failing(ExitCode.UNREACHABLE):
            opened(registry_proxy, tmp_path).download(blob, path, arrived.append)
        assert not path.exists()
        kept = arrived[-1]
        registry_proxy.rule = lambda _request: Fault(200, body=content)
        opened(registry_proxy, tmp_path).download(blob, path, arrived.append)
    assert 0 < kept < 200_000
    assert registry_proxy.seen[-1].headers["Range"] == f"bytes={kept}-"
    assert path.read_bytes() == content
    assert arrived == sorted(arrived)
    assert arrived[-1] == len(content)


def test_credentials_do_not_leave_tls_for_the_same_host(tmp_path: Path) -> None:
    """Registries behind a proxy that terminates TLS redirect clients to plain HTTP."""
    with serve_proxy(FaultProxy("", rule=lambda _request: Fault(401))) as plain:
        source = parse_source(f"oci://{plain.address}/team/tiny:v1")
        assert isinstance(source, RegistrySource)
        give_login(tmp_path, plain.address)
        opened = Registry(
            source,
            Secret(tmp_path, "spec.output.secretRef", "push"),
            allowed=(plain.address,),
            reject=bad_configuration,
        )
        with pytest.raises(StepFailure, match=f"redirects to http://{plain.address}, where the credentials"):
            opened._session.get(f"http://{plain.address}/v2/", headers={"Authorization": f"Basic {LOGIN}"})
        assert plain.seen == []
