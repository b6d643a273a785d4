"""Credentials of Google Cloud Storage and Azure Blob Storage: what is used of them, and what is wrong with others."""

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.credentials import Secret
from tests.support.failures import failing
from tests.support.fake_clouds import FakeCloud, foreign_key, serve_cloud
from tests.support.services.stores import FIELD, CloudStore, bytes_of, of

CONFIGURATION, UNAVAILABLE = ExitCode.BAD_CONFIGURATION, ExitCode.MODEL_UNAVAILABLE
GOOGLE_KEY, AZURE_KEY, AZURE_SAS = "GOOGLE_SERVICE_ACCOUNT_KEY", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"
FOREIGN = FakeCloud(service_account=foreign_key()).service_account_key()


@of("az")
def test_a_container_of_azure_is_used_with_a_shared_access_signature(store: CloudStore) -> None:
    store.publish(secret=store.secret({AZURE_SAS: store.cloud.sas()}))
    assert store.stored().items() >= bytes_of(store.contents).items()


@of("az")
def test_credentials_of_this_machines_user_are_used_on_a_laptop(
    store: CloudStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.log_in(monkeypatch)
    store.publish(secret=Secret(store.root, FIELD, None))
    assert store.stored().items() >= bytes_of(store.contents).items()


@of("gs")
def test_a_key_cannot_redirect_to_another_server(store: CloudStore) -> None:
    with serve_cloud(FakeCloud(), "google") as elsewhere:
        other = f"http://{elsewhere.address}"
        key = store.cloud.service_account_key(gcs_base_url=other, token_uri=other, disable_oauth=True)
        store.publish(secret=store.secret({GOOGLE_KEY: key}))
        assert elsewhere.seen == []
    assert store.cloud.seen[-1][2]["authorization"].startswith("Bearer eyJ")


@pytest.mark.parametrize(
    ("store", "values", "words"),
    [("gs", {GOOGLE_KEY: FOREIGN}, ""), ("az", {AZURE_KEY: "d3Jvbmc="}, "HTTP 403 (AuthenticationFailed) from http")],
    indirect=["store"],
)
def test_the_key_of_another_account_is_rejected(store: CloudStore, values: dict[str, str], words: str) -> None:
    with failing(UNAVAILABLE, f"{store.uri} does not exist, or may not be listed with the credentials of", words):
        store.open(store.secret(values)).files()


@of("az")
def test_a_missing_container_or_storage_account_is_reported(store: CloudStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.address = "az://none/{name}"
    with failing(UNAVAILABLE, "HTTP 404 (ContainerNotFound)"):
        store.open().files()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with failing(CONFIGURATION, "ask the administrator to set azureStorage.account of the profile"):
        store.open()


NO_KEY = "is not the JSON key of a Google service account"


@pytest.mark.parametrize(
    ("store", "values", "named"),
    [
        ("gs", {GOOGLE_KEY: "canary"}, f"{GOOGLE_KEY} {NO_KEY}"),
        ("gs", {GOOGLE_KEY: "[]"}, f"{GOOGLE_KEY} {NO_KEY}"),
        ("gs", {GOOGLE_KEY: '{"type": "service_account", "client_email": "canary"}'}, f"{GOOGLE_KEY} {NO_KEY}"),
        ("gs", {GOOGLE_KEY: FakeCloud().service_account_key(private_key="canary")}, f"private_key in {GOOGLE_KEY}"),
        ("az", {AZURE_KEY: "canary, not base64"}, AZURE_KEY),
        ("az", {AZURE_SAS: "canary"}, AZURE_SAS),
        ("az", {AZURE_KEY: "canary\nsecond"}, AZURE_KEY),
        ("s3", {"AWS_ACCESS_KEY_ID": "canary\nsecond", "AWS_SECRET_ACCESS_KEY": "s"}, "AWS_ACCESS_KEY_ID"),
        ("s3", {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "canary\x00"}, "AWS_SECRET_ACCESS_KEY"),
    ],
    indirect=["store"],
)
def test_a_secret_that_the_client_cannot_use_is_named_and_not_shown(
    store: CloudStore, values: dict[str, str], named: str
) -> None:
    with failing(CONFIGURATION, FIELD, named) as failure:
        store.open(store.secret(values))
    assert "canary" not in failure.value.message
