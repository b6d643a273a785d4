"""Real servers behind TLS of a private authority and a proxy with a password."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session
from urllib3.util import Retry

from qlora_api import contract
from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource, RegistrySource, parse_source
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.network import use_network
from qlora_trainer.stores import bucket
from qlora_trainer.stores import hub as hub_store
from qlora_trainer.stores import registry_auth as oci_auth
from qlora_trainer.stores.contents import describe_files
from qlora_trainer.stores.destinations.addresses import open_destination
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.objects import ObjectFolder
from qlora_trainer.stores.registry import Registry
from tests.support.commands.command import Done, Files, new_files
from tests.support.fake_hub import FakeHub, Rejection, serve
from tests.support.models.tiny import chat_row, write_rows
from tests.support.runs.published import MANIFEST
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, registry, s3_server
from tests.support.services.enterprise import (
    DOMAIN,
    PROXY_PASSWORD,
    PROXY_USER,
    CompanyCertificates,
    CompanyProxy,
    company_certificates,
    company_proxy,
)


@dataclass(frozen=True)
class Company:
    """Its servers, each with HOST:PORT as the proxy resolves it."""

    certificates: CompanyCertificates
    proxy: CompanyProxy
    hub: str
    store: str
    registry: str

    def environment(self, **changes: str) -> dict[str, str]:
        """The operator's input to a pod of a profile with all settings."""
        return {
            contract.ENV_CA_FILE: str(self.certificates.authority),
            contract.ENV_PROXY_SECRET: str(self.proxy.log.parent / "proxy-secret"),
            "HTTPS_PROXY": f"http://{self.proxy.address}",
            "NO_PROXY": "",
            "HF_ENDPOINT": f"https://{self.hub}",
            "AWS_ENDPOINT_URL": f"https://{self.store}",
            contract.ENV_REGISTRIES: self.registry,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            **changes,
        }


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
        names = {"hub": hub.endpoint, "s3": store, "registry": images}
        yield Company(
            certificates, proxy, *(f"{name}.{DOMAIN}:{address.rpartition(':')[2]}" for name, address in names.items())
        )


@pytest.fixture
def job(company: Company, tmp_path: Path, tiny_llama: Path) -> Files:
    """A job that uses all three servers."""
    spec: dict[str, Any] = {
        "model": {"source": f"s3://{BUCKET}/tiny"},
        "dataset": {"source": "hf://acme/rows"},
        "output": {"destination": f"oci://{company.registry}/team/tiny:v1"},
    }
    return new_files(tmp_path, tiny_llama.parent, spec)


def require_no_password(files: Files, done: Done) -> None:
    """Check that no output or file has the proxy's password, however it is encoded."""
    written = [path.read_bytes() for path in files.root.rglob("*") if path.is_file()]
    for content in (*written, done.stdout.encode(), done.stderr.encode(), done.termination.encode()):
        assert b"canary" not in content.lower()


@pytest.mark.slow
def test_a_job_is_prepared_with_all_servers_behind_the_proxy(company: Company, job: Files) -> None:
    """The names are known to the proxy alone, so that nothing has gone past it."""
    company.proxy.log.write_text("")
    done = job.run("prepare", **company.environment())
    assert done.exit_code == 0, done.stdout + done.stderr
    assert set(company.proxy.connections) == {company.hub, company.store, company.registry}
    require_no_password(job, done)


def test_a_step_applies_authority_and_proxy_before_its_first_request(company: Company, job: Files) -> None:
    """The answer is the store's: the folder does not exist."""
    company.proxy.log.write_text("")
    missing = job.with_spec({"model": {"source": f"s3://{BUCKET}/none"}})
    done = missing.run("prepare", **company.environment())
    assert done.result.message == f"s3://{BUCKET}/none has no objects: check bucket and path"
    assert company.store in company.proxy.connections
    require_no_password(missing, done)


class Clients:
    """One request of each kind of client, in this process."""

    def __init__(self, company: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._company, self._scratch, self._patch = company, tmp_path, monkeypatch
        monkeypatch.setattr(bucket, "RETRY", {"max_retries": 0})
        monkeypatch.setattr(oci_auth, "_RETRY", Retry(total=0))
        monkeypatch.setattr(hub_store, "_WAITS", ())

    def apply(self, **changes: str) -> None:
        """The operator's environment for a pod, with changes; an empty value is none."""
        environment = {name: value for name, value in self._company.environment(**changes).items() if value}
        use_network(environment, self._scratch)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HTTPS_PROXY", "NO_PROXY"):
            self._patch.delenv(name, raising=False)
        for name, value in environment.items():
            self._patch.setenv(name, value)
        close_session()
        self._company.proxy.log.write_text("")

    def ask(self, client: str, host: str | None = None) -> None:
        """Send a request, by default to a company name that this machine cannot resolve."""
        company, secret = self._company, Secret(Path("/nowhere"), "spec.output.secretRef", None)
        server = {"hub": company.hub, "s3": company.store, "registry": company.registry}[client]
        server = server if host is None else f"{host}:{server.rpartition(':')[2]}"
        if client == "hub":
            Hub(None, endpoint=f"https://{server}").list("dataset", "acme/rows", None)
        elif client == "s3":
            self._patch.setenv("AWS_ENDPOINT_URL", f"https://{server}")
            ObjectFolder(ObjectStoreSource(BUCKET, "tiny"), secret, reject=bad_configuration).list()
        else:
            source = parse_source(f"oci://{server}/team/none:v1")
            assert isinstance(source, RegistrySource)
            Registry(source, secret, allowed=(server,), reject=bad_configuration).manifest("v1")

    def rejected(self, client: str, host: str | None = None) -> str:
        with pytest.raises(StepFailure) as failure:
            self.ask(client, host)
        assert failure.value.exit_code is ExitCode.UNREACHABLE, failure.value.message
        assert "canary" not in failure.value.message
        return failure.value.message


@pytest.fixture
def clients(company: Company, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clients]:
    yield Clients(company, tmp_path, monkeypatch)
    close_session()


CLIENTS = pytest.mark.parametrize("client", ["hub", "s3", "registry"])


@CLIENTS
@pytest.mark.parametrize(
    ("entry", "host", "through"),
    [
        ("localhost", "localhost", False),
        ("127.0.0.0/8", "127.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.2", "127.0.0.1", True),
        ("host", "localhost", True),
        ("10.0.0.0/8", "localhost", True),
        ("rp.test", None, True),
    ],
)
def test_every_client_understands_no_proxy_in_the_same_way(
    company: Company, clients: Clients, client: str, entry: str, host: str | None, through: bool
) -> None:
    clients.apply(NO_PROXY=f"other.test,{entry}")
    clients.ask(client, host)
    assert bool(company.proxy.connections) is through


@pytest.mark.parametrize("client", ["hub", "registry"])
def test_a_domain_stands_for_all_names_below_it(
    company: Company, clients: Clients, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets the name of the object store itself: see Proxy.serves."""
    resolve = socket.getaddrinfo

    def known(host: str, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if str(host).endswith(DOMAIN) else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    clients.apply(NO_PROXY=DOMAIN)
    clients.ask(client)
    assert company.proxy.connections == []


@CLIENTS
def test_an_authority_that_is_not_named_is_not_trusted(clients: Clients, client: str) -> None:
    clients.apply(**{contract.ENV_CA_FILE: ""})
    message = clients.rejected(client)
    assert "its certificate is from no authority that is trusted; ask the administrator to set caConfigMap" in message


@CLIENTS
def test_a_wrong_password_of_the_proxy_is_reported_and_not_shown(clients: Clients, client: str, tmp_path: Path) -> None:
    for key in contract.PROXY_KEYS:
        (tmp_path / key).write_text("canary-wrong")
    clients.apply(**{contract.ENV_PROXY_SECRET: str(tmp_path)})
    message = clients.rejected(client)
    assert "407" in message
    assert "proxy" in message.lower()


@CLIENTS
def test_a_proxy_that_does_not_answer_is_retried(clients: Clients, client: str) -> None:
    clients.apply(HTTPS_PROXY="http://127.0.0.1:9")
    assert "proxy" in clients.rejected(client).lower()


def test_no_credential_follows_a_redirect_through_the_proxy(
    company: Company, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients.apply()
    monkeypatch.setenv("AWS_SESSION_TOKEN", "canary-session")
    elsewhere = f"https://elsewhere.{DOMAIN}:{company.store.rpartition(':')[2]}/"
    tls = (company.certificates.certificate, company.certificates.key)
    rejection = Rejection(307, location=elsewhere)
    with serve(FakeHub(reject=lambda _method, _path: rejection), tls=tls) as redirecting:
        port = redirecting.endpoint.rpartition(":")[2]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://s3.{DOMAIN}:{port}")
        folder = ObjectFolder(
            ObjectStoreSource(BUCKET, "tiny"), Secret(Path("/nowhere"), "f", None), reject=bad_configuration
        )
        with pytest.raises(StepFailure, match="to another host, where credentials are never sent") as failure:
            folder.list()
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert set(company.proxy.connections) == {f"s3.{DOMAIN}:{port}"}


def test_an_adapter_is_published_through_the_proxy(company: Company, clients: Clients) -> None:
    clients.apply()
    secret = Secret(Path("/nowhere"), "spec.output.secretRef", None)
    contents = {"adapter_config.json": b"{}"}
    manifest = MANIFEST.model_copy(update={"files": describe_files(contents)})
    for address in (f"oci://{company.registry}/team/tuned:v1", f"s3://{BUCKET}/tuned"):
        destination = open_destination(
            address, mounts=Mounts(claims={}), secret=secret, registries=(company.registry,), owner="job"
        )
        assert publish_folder(destination, contents, manifest).startswith(address)
    assert set(company.proxy.connections) == {company.registry, company.store}
