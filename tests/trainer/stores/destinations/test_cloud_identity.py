"""The identity that a cloud gives a pod: requested where the profile allows it, and nowhere else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_api import contract
from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.network import use_network
from qlora_trainer.stores.objects import ObjectFolder
from tests.support.failures import failing
from tests.support.fake_clouds import BUCKET, CLIENT, ROLE, SESSION, TENANT, FakeCloud, serve_cloud
from tests.support.services.enterprise import company_certificates
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy
from tests.support.services.stores import FIELD, CloudStore, bytes_of, let_retry, of

NO_SECRET = Secret(Path("/nowhere"), FIELD, None)
CONFIGURATION, UNREACHABLE = ExitCode.BAD_CONFIGURATION, ExitCode.UNREACHABLE
LISTING = (
    b"<ListBucketResult><Contents><Key>a/b/x</Key><Size>1</Size><ETag>&quot;e&quot;</ETag>"
    b"<LastModified>2026-07-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)


def give(patch: pytest.MonkeyPatch, identity: str | None, **environment: str) -> None:
    """Set variables for the pod: the operator's, for that identity, and those of a cloud's webhook."""
    for name, value in (environment | ({} if identity is None else {contract.ENV_CLOUD_IDENTITY: identity})).items():
        patch.setenv(name, value)


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """The pod's own token, as the kubelet projects it."""
    (tmp_path / "token").write_text(FakeCloud().projected)
    return tmp_path / "token"


@pytest.fixture
def pod(store: CloudStore, token: Path, monkeypatch: pytest.MonkeyPatch) -> CloudStore:
    """The store, for a pod on a node with workload identity that its cloud's webhook has changed."""
    address = store.proxy.address
    give(monkeypatch, None, GCE_METADATA_HOST=address, AZURE_AUTHORITY_HOST=f"http://{address}/")
    give(monkeypatch, None, AZURE_CLIENT_ID=CLIENT, AZURE_TENANT_ID=TENANT, AZURE_FEDERATED_TOKEN_FILE=str(token))
    return store


@pytest.mark.parametrize(("store", "identity"), [("gs", "google"), ("az", "azure")], indirect=["store"])
def test_workload_identity_opens_a_bucket(pod: CloudStore, monkeypatch: pytest.MonkeyPatch, identity: str) -> None:
    give(monkeypatch, identity)
    pod.publish(secret=NO_SECRET)
    assert pod.stored().items() >= bytes_of(pod.contents).items()
    assert pod.cloud.tokens


@pytest.mark.parametrize(
    ("store", "identity"),
    [("gs", None), ("gs", "aws"), ("gs", "azure"), ("az", None), ("az", "google")],
    indirect=["store"],
)
def test_without_permission_of_the_profile_an_identity_is_not_requested(
    pod: CloudStore, monkeypatch: pytest.MonkeyPatch, identity: str | None
) -> None:
    """Permission for another cloud does not count: it would give the node's identity."""
    give(monkeypatch, identity)
    with failing(CONFIGURATION, f"with no credentials ({FIELD})"):
        pod.publish(secret=NO_SECRET)
    assert pod.cloud.tokens == set()


@of("gs")
def test_a_secret_that_the_job_names_comes_before_the_identity(
    pod: CloudStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing Secret too: the step waits for it, and does not use other rights."""
    give(monkeypatch, "google")
    with failing(UNREACHABLE, "Secret 'keys' with GOOGLE_SERVICE_ACCOUNT_KEY"):
        pod.publish(secret=Secret(Path("/nowhere"), FIELD, "keys"))
    assert pod.cloud.seen == []


@of("az")
def test_a_token_that_the_cloud_rejects_is_not_shown(
    pod: CloudStore, monkeypatch: pytest.MonkeyPatch, token: Path
) -> None:
    token.write_text("canary-of-another-pod")
    give(monkeypatch, "azure")
    with failing(CONFIGURATION, "may not be read with the pod's cloud identity (HTTP 401") as failure:
        pod.publish(secret=NO_SECRET)
    assert "canary" not in failure.value.message


@of("az")
def test_a_pod_that_no_webhook_has_changed_is_retried(store: CloudStore, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, "azure")
    with failing(
        UNREACHABLE, "the pod was given no cloud identity (AZURE_CLIENT_ID is not set): ask the administrator"
    ):
        store.publish(secret=NO_SECRET)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A store that lets any client with temporary keys list."""

    def answer(request: Request) -> Fault:
        given = request.headers.get("x-amz-security-token"), request.headers.get("authorization", "")
        if given[0] == SESSION and f"Credential={FakeCloud.keys[0]}/" in given[1]:
            return Fault(200, {"Content-Type": "application/xml"}, LISTING)
        return Fault(403)

    let_retry(monkeypatch, 0)
    with serve_proxy(FaultProxy("", rule=answer)) as store:
        give(monkeypatch, None, AWS_ENDPOINT_URL=f"http://{store.address}")
        yield store


@pytest.fixture
def sts(token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    """Serve STS with TLS of a private authority, and set the variables of IRSA."""
    certificates = company_certificates(tmp_path)
    environment = {contract.ENV_CA_FILE: str(certificates.authority)}
    use_network(environment, tmp_path)
    give(monkeypatch, None, **environment, AWS_ROLE_ARN=ROLE, AWS_WEB_IDENTITY_TOKEN_FILE=str(token))
    with serve_cloud(FakeCloud(), "aws", tls=(certificates.certificate, certificates.key)) as cloud:
        give(monkeypatch, None, AWS_ENDPOINT_URL_STS=f"https://{cloud.address}")
        yield cloud


@pytest.fixture
def agent(token: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    """The agent of EKS Pod Identity."""
    with serve_cloud(FakeCloud(), "aws") as cloud:
        give(monkeypatch, None, AWS_CONTAINER_CREDENTIALS_FULL_URI=f"http://{cloud.address}/v1/credentials")
        give(monkeypatch, None, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))
        yield cloud


def listed() -> list[str]:
    """Names in a folder of the bucket."""
    return list(ObjectFolder(ObjectStoreSource(BUCKET, "a/b", "s3"), NO_SECRET, reject=bad_configuration).list())


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("service", ["sts", "agent"])
def test_aws_gives_a_pod_temporary_keys(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """By a role for its ServiceAccount, or Pod Identity of EKS."""
    request.getfixturevalue(service)
    give(monkeypatch, "aws")
    assert listed() == ["x"]


@pytest.mark.parametrize("service", ["sts", "agent"])
def test_without_permission_of_the_profile_aws_is_not_asked(
    request: pytest.FixtureRequest, s3: FaultProxy, service: str
) -> None:
    cloud = request.getfixturevalue(service)
    with failing(CONFIGURATION, f"with no credentials ({FIELD})"):
        listed()
    assert cloud.seen == []
    assert not any("authorization" in map(str.lower, found.headers) for found in s3.seen)


@pytest.mark.usefixtures("s3")
def test_a_pod_without_the_agent_of_aws_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, "aws")
    with failing(UNREACHABLE, "the pod was given no cloud identity (AWS_CONTAINER_CREDENTIALS_FULL_URI is not set)"):
        listed()
