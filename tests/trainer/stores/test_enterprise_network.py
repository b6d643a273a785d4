"""Hub, object store and registry behind TLS of a private authority and a proxy with a password: all real servers."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_api import contract
from tests.support.command import Done, Files, new_files
from tests.support.enterprise import (
    DOMAIN,
    PROXY_PASSWORD,
    PROXY_USER,
    CompanyCertificates,
    CompanyProxy,
    company_certificates,
    company_proxy,
)
from tests.support.fake_hub import FakeHub, serve
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, registry, s3_server
from tests.support.tiny import chat_row, write_rows


@dataclass(frozen=True)
class Company:
    """Its servers, each with HOST:PORT as the proxy resolves it."""

    certificates: CompanyCertificates
    proxy: CompanyProxy
    hub: FakeHub
    hub_port: str
    store_port: str
    registry_port: str

    def environment(self, **changes: str) -> dict[str, str]:
        """What the operator gives a pod of a profile with all settings."""
        return {
            contract.ENV_CA_FILE: str(self.certificates.authority),
            contract.ENV_PROXY_SECRET: str(self.proxy.log.parent / "proxy-secret"),
            "HTTPS_PROXY": f"http://{self.proxy.address}",
            "NO_PROXY": "",
            "HF_ENDPOINT": f"https://hub.{DOMAIN}:{self.hub_port}",
            "AWS_ENDPOINT_URL": f"https://s3.{DOMAIN}:{self.store_port}",
            contract.ENV_REGISTRIES: f"registry.{DOMAIN}:{self.registry_port}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            **changes,
        }


def _port(address: str) -> str:
    return address.rpartition(":")[2]


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Company]:
    root = tmp_path_factory.mktemp("company")
    certificates = company_certificates(root / "certificates")
    tls = (certificates.certificate, certificates.key)
    write_rows(root / "rows" / "train.jsonl", [chat_row("Which pods?", "kubectl get pods")] * 3)
    (root / "proxy-secret").mkdir()
    (root / "proxy-secret" / "username").write_text(f"{PROXY_USER}\n")
    (root / "proxy-secret" / "password").write_text(PROXY_PASSWORD)
    with (
        serve(FakeHub({"datasets/acme/rows": root / "rows"}), tls=tls) as hub,
        s3_server(root / "s3", tls=tls) as store,
        registry(root / "registry", tls=tls) as images,
        company_proxy(root, password=PROXY_PASSWORD) as proxy,
    ):
        shutil.copytree(tiny_llama, root / "s3" / "buckets" / BUCKET / "tiny")
        yield Company(certificates, proxy, hub, _port(hub.endpoint), _port(store), _port(images))


@pytest.fixture
def job(company: Company, tmp_path: Path, tiny_llama: Path) -> Files:
    """A job that uses all three servers."""
    spec: dict[str, Any] = {
        "model": {"source": f"s3://{BUCKET}/tiny"},
        "dataset": {"source": "hf://acme/rows"},
        "output": {"destination": f"oci://registry.{DOMAIN}:{company.registry_port}/team/tiny:v1"},
    }
    return new_files(tmp_path, tiny_llama.parent, spec)


def require_no_password(files: Files, done: Done) -> None:
    """Neither what the step has written nor what it has left says the proxy's password, however it is encoded."""
    written = [path.read_bytes() for path in files.root.rglob("*") if path.is_file()]
    for content in (*written, done.stdout.encode(), done.stderr.encode(), done.termination.encode()):
        assert b"canary" not in content.lower()


def test_every_client_trusts_the_authority_and_goes_through_the_proxy(company: Company, job: Files) -> None:
    """The names are known to the proxy alone, so that nothing has gone past it."""
    done = job.run("prepare", **company.environment())
    assert done.exit_code == 0, done.stdout + done.stderr
    assert set(company.proxy.connections) == {
        f"hub.{DOMAIN}:{company.hub_port}",
        f"s3.{DOMAIN}:{company.store_port}",
        f"registry.{DOMAIN}:{company.registry_port}",
    }
    require_no_password(job, done)
