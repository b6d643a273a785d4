"""Google Cloud Storage and Azure Blob Storage, with each kind of credentials that they know."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable
from qlora_trainer.data.read.hub_splits import TRAINING
from qlora_trainer.data.read.locate import find_data
from qlora_trainer.stores import bucket
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.contents import describe_files
from qlora_trainer.stores.destinations.addresses import open_destination
from qlora_trainer.stores.destinations.destination import publish_folder
from qlora_trainer.stores.objects import ObjectFolder
from tests.support.fake_clouds import ACCOUNT, BUCKET, FakeCloud, foreign_key, serve_cloud
from tests.support.runs.published import MANIFEST

FIELD = "spec.output.secretRef"
LARGE = b"weights!" * 1_200_000
"""Takes two parts."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RETRY", {"max_retries": 0})


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    with serve_cloud(FakeCloud(), "google") as cloud:
        monkeypatch.setenv("GOOGLE_BASE_URL", f"http://{cloud.address}")
        yield cloud


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    with serve_cloud(FakeCloud(), "azure") as cloud:
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://{cloud.address}")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
        yield cloud


def secret(root: Path, **values: str) -> Secret:
    """A mounted Secret with these values."""
    folder = root / "credentials"
    folder.mkdir(exist_ok=True)
    for key, value in values.items():
        (folder / key).write_text(value)
    return Secret(folder, FIELD, "store")


def no_secret(root: Path) -> Secret:
    return Secret(root / "credentials", FIELD, None)


def folder_of(scheme: str, credentials: Secret) -> ObjectFolder:
    return ObjectFolder(ObjectStoreSource(BUCKET, "models/tiny", scheme), credentials, reject=model_unavailable)


def require_usable(folder: ObjectFolder, cloud: FakeCloud, root: Path) -> None:
    """A job's use of a folder: in one or several parts, read whole, or from an offset."""
    path, arrived = root / "large", root / "arrived"
    path.write_bytes(LARGE)
    folder.write("config.json", b"{}")
    folder.write("model.safetensors", path)
    assert (folder.create("config.json", b"other"), folder.create("new", b"1")) == (False, True)
    folder.delete("new")
    assert cloud.objects == {"models/tiny/config.json": b"{}", "models/tiny/model.safetensors": LARGE}
    assert folder.read("config.json", most=10) == b"{}"
    assert folder.read("none", most=10) is None
    assert folder.digest("model.safetensors") == sha256(LARGE).hexdigest()
    found = folder.list()
    assert {name: entry.size for name, entry in found.items()} == {"config.json": 2, "model.safetensors": len(LARGE)}
    entry = found["model.safetensors"]
    partial = root / f".arrived.{sha256(entry.etag.encode()).hexdigest()[:16]}.partial"
    partial.write_bytes(LARGE[:10])
    folder.download(entry, arrived, lambda _done: None)
    assert arrived.read_bytes() == LARGE


def rejected(action: Any, code: ExitCode) -> str:
    with pytest.raises(StepFailure) as failure:
        action()
    assert failure.value.exit_code is code, failure.value.message
    assert "canary" not in failure.value.message
    return failure.value.message


def test_a_bucket_of_google_is_used_with_a_service_account(google: FakeCloud, tmp_path: Path) -> None:
    keys = secret(tmp_path, GOOGLE_SERVICE_ACCOUNT_KEY=google.service_account_key())
    require_usable(folder_of("gs", keys), google, tmp_path)


def test_a_key_cannot_redirect_to_another_server(google: FakeCloud, tmp_path: Path) -> None:
    with serve_cloud(FakeCloud(), "google") as elsewhere:
        other = f"http://{elsewhere.address}"
        key = google.service_account_key(gcs_base_url=other, token_uri=other, disable_oauth=True)
        folder_of("gs", secret(tmp_path, GOOGLE_SERVICE_ACCOUNT_KEY=key)).write("x", b"1")
        assert elsewhere.seen == []
    assert google.objects == {"models/tiny/x": b"1"}
    assert google.seen[-1][2]["authorization"].startswith("Bearer eyJ")


def test_the_key_of_another_service_account_is_rejected(google: FakeCloud, tmp_path: Path) -> None:
    keys = secret(tmp_path, GOOGLE_SERVICE_ACCOUNT_KEY=FakeCloud(service_account=foreign_key()).service_account_key())
    message = rejected(folder_of("gs", keys).list, ExitCode.MODEL_UNAVAILABLE)
    assert message.startswith(f"gs://{BUCKET}/models/tiny does not exist, or may not be listed with the credentials of")


@pytest.mark.parametrize("key", ["canary", "[]", '{"type": "service_account", "client_email": "canary"}'])
def test_an_invalid_key_is_reported(google: FakeCloud, tmp_path: Path, key: str) -> None:
    keys = secret(tmp_path, GOOGLE_SERVICE_ACCOUNT_KEY=key)
    message = rejected(lambda: folder_of("gs", keys), ExitCode.BAD_CONFIGURATION)
    assert message.startswith(f"{FIELD}: GOOGLE_SERVICE_ACCOUNT_KEY is not the JSON key of a Google service account")


@pytest.mark.parametrize("kind", ["account key", "shared access signature"])
def test_a_container_of_azure_is_used_with_a_key_or_a_signature(azure: FakeCloud, tmp_path: Path, kind: str) -> None:
    if kind == "account key":
        keys = secret(tmp_path, AZURE_STORAGE_ACCOUNT_KEY=azure.account_key)
    else:
        keys = secret(tmp_path, AZURE_STORAGE_SAS_TOKEN=azure.sas())
    require_usable(folder_of("az", keys), azure, tmp_path)


def test_a_wrong_key_of_azure_is_rejected(azure: FakeCloud, tmp_path: Path) -> None:
    keys = secret(tmp_path, AZURE_STORAGE_ACCOUNT_KEY="d3Jvbmc=")
    message = rejected(folder_of("az", keys).list, ExitCode.MODEL_UNAVAILABLE)
    assert f"HTTP 403 (AuthenticationFailed) from http://{azure.address}" in message


def test_without_a_storage_account_in_the_profile_no_container_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    message = rejected(lambda: folder_of("az", no_secret(tmp_path)), ExitCode.BAD_CONFIGURATION)
    assert "ask the administrator to set azureStorage.account of the profile" in message


@pytest.mark.usefixtures("google", "azure")
@pytest.mark.parametrize(
    ("scheme", "keys"),
    [("gs", "GOOGLE_SERVICE_ACCOUNT_KEY"), ("az", "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN")],
)
def test_a_missing_secret_is_waited_for(tmp_path: Path, scheme: str, keys: str) -> None:
    message = rejected(lambda: folder_of(scheme, secret(tmp_path)), ExitCode.UNREACHABLE)
    assert message == f"Secret 'store' with {keys} ({FIELD}) does not exist in the job's namespace"


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize("action", ["list", "write", "delete"])
def test_without_a_secret_nothing_is_signed(
    google: FakeCloud, azure: FakeCloud, tmp_path: Path, scheme: str, action: str
) -> None:
    """No metadata service gets a request for the node's credentials either."""
    folder, cloud = folder_of(scheme, no_secret(tmp_path)), google if scheme == "gs" else azure
    actions = {"list": folder.list, "write": lambda: folder.write("x", b"1"), "delete": lambda: folder.delete("x")}
    message = rejected(actions[action], ExitCode.MODEL_UNAVAILABLE)
    assert f"with no credentials ({FIELD}) (HTTP 403" in message
    assert {headers.get("authorization", "").strip() for _, _, headers in cloud.seen} <= {"", "Bearer"}


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_an_adapter_is_published_and_data_are_read(
    google: FakeCloud, azure: FakeCloud, tmp_path: Path, scheme: str
) -> None:
    keys = secret(
        tmp_path,
        GOOGLE_SERVICE_ACCOUNT_KEY=google.service_account_key(),
        AZURE_STORAGE_ACCOUNT_KEY=azure.account_key,
    )
    address, mounts = f"{scheme}://{BUCKET}/adapters/v1", Mounts(claims={})
    contents = {"adapter_config.json": b"{}", "rows.jsonl": b'{"text": "a"}\n'}
    manifest = MANIFEST.model_copy(update={"files": describe_files(contents)})
    destination = open_destination(address, mounts=mounts, secret=keys, registries=(), owner="job")
    destination.require_writable()
    assert publish_folder(destination, contents, manifest) == address
    cloud = google if scheme == "gs" else azure
    assert set(cloud.objects) == {f"adapters/v1/{name}" for name in (*contents, "manifest.json")}
    access = StoreAccess(mounts, lambda: pytest.fail("no hub is needed"), keys)
    found = find_data(f"{address}/rows.jsonl", TRAINING, access, tmp_path / "download")
    assert [file.path.read_bytes() for file in found.files] == [contents["rows.jsonl"]]


def test_credentials_of_this_machines_user_are_used_on_a_laptop(
    azure: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "AZURE_STORAGE_ACCOUNT_KEY", azure.account_key)
    folder_of("az", no_secret(tmp_path)).write("x", b"1")
    assert azure.objects == {"models/tiny/x": b"1"}


def test_a_missing_bucket_is_reported(azure: FakeCloud, tmp_path: Path) -> None:
    keys = secret(tmp_path, AZURE_STORAGE_ACCOUNT_KEY=azure.account_key)
    folder = ObjectFolder(ObjectStoreSource("none", "x", "az"), keys, reject=bad_configuration)
    assert "HTTP 404 (ContainerNotFound)" in rejected(folder.list, ExitCode.BAD_CONFIGURATION)


@pytest.mark.usefixtures("google", "azure")
@pytest.mark.parametrize(
    ("scheme", "values", "named"),
    [
        (
            "gs",
            {"GOOGLE_SERVICE_ACCOUNT_KEY": FakeCloud().service_account_key(private_key="canary")},
            "private_key in GOOGLE_SERVICE_ACCOUNT_KEY",
        ),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "canary, not base64"}, "AZURE_STORAGE_ACCOUNT_KEY"),
        ("az", {"AZURE_STORAGE_SAS_TOKEN": "canary"}, "AZURE_STORAGE_SAS_TOKEN"),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "canary\nsecond"}, "AZURE_STORAGE_ACCOUNT_KEY"),
        ("s3", {"AWS_ACCESS_KEY_ID": "canary\nsecond", "AWS_SECRET_ACCESS_KEY": "s"}, "AWS_ACCESS_KEY_ID"),
        ("s3", {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "canary\x00"}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_secret_that_the_client_cannot_use_is_named_and_not_shown(
    tmp_path: Path, scheme: str, values: dict[str, str], named: str
) -> None:
    message = rejected(lambda: folder_of(scheme, secret(tmp_path, **values)), ExitCode.BAD_CONFIGURATION)
    assert FIELD in message
    assert named in message
