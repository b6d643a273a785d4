"""The identity that a cloud gives a pod: requested where the profile allows it, and nowhere else."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_api import contract
from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.network import use_network
from qlora_trainer.stores import bucket
from qlora_trainer.stores.objects import ObjectFolder
from tests.support.fake_clouds import ACCOUNT, BUCKET, CLIENT, ROLE, SESSION, TENANT, FakeCloud, serve_cloud
from tests.support.services.enterprise import company_certificates
from tests.support.services.fault_proxy import Fault, FaultProxy, Request, serve_proxy

LISTING = (
    b"<ListBucketResult><Contents><Key>a/b/x</Key><Size>1</Size><ETag>&quot;e&quot;</ETag>"
    b"<LastModified>2026-07-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)
Give = Callable[..., None]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RETRY", {"max_retries": 0})


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """Sets variables of the operator, or of a cloud's webhook, for the pod."""

    def give(**environment: str) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.fixture
def token(tmp_path: Path) -> Path:
    """The pod's own token, as the kubelet projects it."""
    path = tmp_path / "token"
    path.write_text(FakeCloud().projected)
    return path


@pytest.fixture
def google(give: Give) -> Iterator[FakeCloud]:
    """The store, and the metadata server of a node with workload identity."""
    with serve_cloud(FakeCloud(), "google") as cloud:
        give(GOOGLE_BASE_URL=f"http://{cloud.address}", GCE_METADATA_HOST=cloud.address)
        yield cloud


@pytest.fixture
def azure(give: Give, token: Path) -> Iterator[FakeCloud]:
    """The store, and the variables of Azure workload identity's webhook for a pod."""
    with serve_cloud(FakeCloud(), "azure") as cloud:
        give(AZURE_STORAGE_ENDPOINT=f"http://{cloud.address}", AZURE_STORAGE_ACCOUNT_NAME=ACCOUNT)
        give(AZURE_CLIENT_ID=CLIENT, AZURE_TENANT_ID=TENANT, AZURE_FEDERATED_TOKEN_FILE=str(token))
        give(AZURE_AUTHORITY_HOST=f"http://{cloud.address}/")
        yield cloud


@pytest.fixture
def s3(give: Give) -> Iterator[FaultProxy]:
    """A store that lets any client with temporary keys list."""

    def answer(request: Request) -> Fault:
        given = request.headers.get("x-amz-security-token"), request.headers.get("authorization", "")
        if given[0] == SESSION and f"Credential={FakeCloud.keys[0]}/" in given[1]:
            return Fault(200, {"Content-Type": "application/xml"}, LISTING)
        return Fault(403)

    with serve_proxy(FaultProxy("", rule=answer)) as store:
        give(AWS_ENDPOINT_URL=f"http://{store.address}")
        yield store


@pytest.fixture
def sts(give: Give, token: Path, tmp_path: Path) -> Iterator[FakeCloud]:
    """Serve STS with TLS of a private authority, and set the variables of IRSA."""
    certificates = company_certificates(tmp_path)
    environment = {contract.ENV_CA_FILE: str(certificates.authority)}
    use_network(environment, tmp_path)
    give(**environment, AWS_ROLE_ARN=ROLE, AWS_WEB_IDENTITY_TOKEN_FILE=str(token))
    with serve_cloud(FakeCloud(), "aws", tls=(certificates.certificate, certificates.key)) as cloud:
        give(AWS_ENDPOINT_URL_STS=f"https://{cloud.address}")
        yield cloud


def folder_of(scheme: str, name: str | None = None) -> ObjectFolder:
    secret = Secret(Path("/nowhere"), "spec.model.secretRef", name)
    return ObjectFolder(ObjectStoreSource(BUCKET, "a/b", scheme), secret, reject=bad_configuration)


def rejected(scheme: str, code: ExitCode) -> str:
    with pytest.raises(StepFailure) as failure:
        folder_of(scheme).list()
    assert failure.value.exit_code is code, failure.value.message
    return failure.value.message


def test_gkes_workload_identity_opens_a_bucket(google: FakeCloud, give: Give) -> None:
    give(**{contract.ENV_CLOUD_IDENTITY: "google"})
    folder_of("gs").write("x", b"1")
    assert google.objects == {"a/b/x": b"1"}
    assert len(google.tokens) == 1


def test_azures_workload_identity_opens_a_container(azure: FakeCloud, give: Give) -> None:
    give(**{contract.ENV_CLOUD_IDENTITY: "azure"})
    folder_of("az").write("x", b"1")
    assert azure.objects == {"a/b/x": b"1"}
    assert len(azure.tokens) == 1


@pytest.mark.usefixtures("s3", "sts")
def test_a_role_for_a_service_account_opens_a_bucket_of_s3(give: Give) -> None:
    give(**{contract.ENV_CLOUD_IDENTITY: "aws"})
    assert list(folder_of("s3").list()) == ["x"]


def test_pod_identity_of_eks_opens_a_bucket_of_s3(s3: FaultProxy, give: Give, token: Path) -> None:
    with serve_cloud(FakeCloud(), "aws") as agent:
        give(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"http://{agent.address}/v1/credentials")
        give(AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token), **{contract.ENV_CLOUD_IDENTITY: "aws"})
        assert list(folder_of("s3").list()) == ["x"]


@pytest.mark.parametrize(
    ("scheme", "identity"), [("gs", None), ("gs", "aws"), ("gs", "azure"), ("az", None), ("az", "google")]
)
def test_without_permission_of_the_profile_an_identity_is_not_requested(
    google: FakeCloud, azure: FakeCloud, give: Give, scheme: str, identity: str | None
) -> None:
    """Permission for another cloud does not count: it would give the node's identity."""
    if identity is not None:
        give(**{contract.ENV_CLOUD_IDENTITY: identity})
    assert "with no credentials (spec.model.secretRef)" in rejected(scheme, ExitCode.BAD_CONFIGURATION)
    assert google.tokens == azure.tokens == set()


def test_without_permission_of_the_profile_pod_identity_is_not_requested(
    s3: FaultProxy, give: Give, token: Path
) -> None:
    with serve_cloud(FakeCloud(), "aws") as agent:
        give(AWS_CONTAINER_CREDENTIALS_FULL_URI=f"http://{agent.address}/v1/credentials")
        give(AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token))
        assert "with no credentials (spec.model.secretRef)" in rejected("s3", ExitCode.BAD_CONFIGURATION)
        assert agent.seen == []


@pytest.mark.parametrize(
    ("provider", "scheme", "variable"),
    [("aws", "s3", "AWS_CONTAINER_CREDENTIALS_FULL_URI"), ("azure", "az", "AZURE_CLIENT_ID")],
)
def test_a_pod_that_no_webhook_has_changed_is_retried(give: Give, provider: str, scheme: str, variable: str) -> None:
    give(**{contract.ENV_CLOUD_IDENTITY: provider}, AZURE_STORAGE_ACCOUNT_NAME=ACCOUNT)
    message = rejected(scheme, ExitCode.UNREACHABLE)
    assert message.startswith(f"the pod was given no cloud identity ({variable} is not set): ask the administrator")


def test_a_secret_that_the_job_names_comes_before_the_identity(google: FakeCloud, give: Give) -> None:
    """A missing Secret too: the step waits for it, and does not use other rights."""
    give(**{contract.ENV_CLOUD_IDENTITY: "google"})
    with pytest.raises(StepFailure, match="Secret 'keys' with GOOGLE_SERVICE_ACCOUNT_KEY"):
        folder_of("gs", "keys")
    assert google.seen == []


def test_a_token_that_the_cloud_rejects_is_not_shown(azure: FakeCloud, give: Give, token: Path) -> None:
    token.write_text("canary-of-another-pod")
    give(**{contract.ENV_CLOUD_IDENTITY: "azure"})
    message = rejected("az", ExitCode.BAD_CONFIGURATION)
    assert "may not be listed with the pod's cloud identity (HTTP 401" in message
    assert "canary" not in message


def test_without_permission_of_the_profile_a_role_of_aws_is_not_taken(s3: FaultProxy, sts: FakeCloud) -> None:
    assert "with no credentials (spec.model.secretRef)" in rejected("s3", ExitCode.BAD_CONFIGURATION)
    assert sts.seen == []
    assert not any("Authorization" in request.headers for request in s3.seen)
