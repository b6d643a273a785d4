"""A profile's network and cloud settings reach the pods of prepare and publish only."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.profile import Profile
from qlora_api.status import StepName
from tests.support.builders import to_json
from tests.support.job_manifests import build, container_of, environment_of, pod_of

NETWORK: dict[str, Any] = {
    "caConfigMap": {"name": "company-ca", "key": "bundle.pem"},
    "httpsProxy": "http://proxy.example.org:3128",
    "noProxy": ["example.org", "10.0.0.0/8"],
    "proxySecretName": "proxy-login",
}
STORES: dict[str, Any] = {
    "googleStorage": {"endpoint": "https://gcs.example.org"},
    "azureStorage": {"account": "teamdata", "endpoint": "https://blob.example.org"},
}
ONLINE: tuple[StepName, ...] = ("prepare", "publish")
OFFLINE: tuple[StepName, ...] = ("train", "clean")


@pytest.mark.parametrize("step", ONLINE)
def test_a_step_with_a_network_gets_the_authority_and_the_proxy(step: StepName) -> None:
    job = build(step, NETWORK)
    assert (
        environment_of(job).items()
        >= {
            "QLORA_CA_FILE": "/ca/company-ca/bundle.pem",
            "HTTPS_PROXY": "http://proxy.example.org:3128",
            "NO_PROXY": "example.org,10.0.0.0/8",
            "QLORA_PROXY_SECRET": "/proxy/proxy-login",
        }.items()
    )
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    # Not optional: the pod waits for them, and its status names the missing ones.
    items = [{"key": "bundle.pem", "path": "bundle.pem"}]
    assert volumes["ca"]["configMap"] == {"name": "company-ca", "items": items}
    assert volumes["proxy"]["secret"] == {
        "secretName": "proxy-login",
        "items": [{"key": "username", "path": "username"}, {"key": "password", "path": "password"}],
        "defaultMode": 0o440,
    }
    mounts = {mount["name"]: mount for mount in container_of(job)["volumeMounts"]}
    assert mounts["ca"] == {"name": "ca", "mountPath": "/ca/company-ca", "readOnly": True}
    assert mounts["proxy"] == {"name": "proxy", "mountPath": "/proxy/proxy-login", "readOnly": True}


@pytest.mark.parametrize("step", OFFLINE)
def test_a_step_without_a_network_gets_neither_authority_nor_proxy(step: StepName) -> None:
    template = to_json(build(step, {**NETWORK, **STORES}))
    for word in ("company-ca", "proxy", "PROXY", "teamdata", "gcs.example.org", "blob.example.org"):
        assert word not in template


@pytest.mark.parametrize("step", ONLINE)
def test_the_stores_of_clouds_are_the_profiles(step: StepName) -> None:
    assert (
        environment_of(build(step, STORES)).items()
        >= {
            "GOOGLE_BASE_URL": "https://gcs.example.org",
            "AZURE_STORAGE_ACCOUNT_NAME": "teamdata",
            "AZURE_STORAGE_ENDPOINT": "https://blob.example.org",
        }.items()
    )


@pytest.mark.parametrize("provider", ["aws", "google", "azure"])
def test_prepare_and_publish_alone_have_the_identity_that_the_profile_names(provider: str) -> None:
    identity = {"cloudIdentity": {"provider": provider, "serviceAccountName": "data"}, "serviceAccountName": "plain"}
    for step in (*ONLINE, *OFFLINE):
        job, online = build(step, identity), step in ONLINE
        template = job["spec"]["template"]
        assert template["spec"]["serviceAccountName"] == ("data" if online else "plain")
        # The cloud's webhook adds a separate token.
        assert template["spec"]["automountServiceAccountToken"] is False
        assert environment_of(job).get("QLORA_CLOUD_IDENTITY") == (provider if online else None)
        labels = template["metadata"]["labels"]
        assert labels.get("qlora.dev/cloud-identity") == (provider if online else None)
        assert ("azure.workload.identity/use" in labels) == (online and provider == "azure")


@pytest.mark.parametrize("step", [*ONLINE, *OFFLINE])
def test_without_an_identity_in_the_profile_pods_have_none(step: StepName) -> None:
    job = build(step, {})
    template = job["spec"]["template"]
    assert "serviceAccountName" not in template["spec"]
    assert "QLORA_CLOUD_IDENTITY" not in environment_of(job)
    assert not {"qlora.dev/cloud-identity", "azure.workload.identity/use"} & set(template["metadata"]["labels"])


def test_the_secrets_of_clouds_are_files_with_the_keys_of_their_scheme() -> None:
    spec = {
        "model": {"source": "gs://models/tiny", "secretRef": {"name": "google"}},
        "output": {"destination": "az://adapters/tiny", "secretRef": {"name": "azure"}},
    }
    sources = {
        volume["name"]: [source["secret"] for source in volume["projected"]["sources"]]
        for volume in pod_of(build("prepare", **spec))["volumes"]
        if "projected" in volume
    }
    key = "GOOGLE_SERVICE_ACCOUNT_KEY"
    assert sources["model-credentials"] == [{"name": "google", "items": [{"key": key, "path": key}]}]
    (azure,) = sources["output-credentials"]
    assert azure["optional"] is True
    assert [item["key"] for item in azure["items"]] == ["AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"noProxy": ["example.org"]}, "noProxy and proxySecretName are for httpsProxy"),
        ({"proxySecretName": "login"}, "noProxy and proxySecretName are for httpsProxy"),
        ({"httpsProxy": "http://team:secret@proxy:3128"}, "httpsProxy"),
        ({"httpsProxy": "https://proxy.example.org"}, "httpsProxy"),
        ({"httpsProxy": "proxy.example.org:3128"}, "httpsProxy"),
        *(
            (
                {"httpsProxy": "http://proxy:3128", "noProxy": [entry]},
                "an entry is a host or domain name",
            )
            for entry in (".example.org", "*.example.org", "*", "host:8080", "http://host", "fd00::/8", "a b", "a/8")
        ),
        ({"httpsProxy": "http://proxy:3128", "noProxy": ["10.0.0.1/8"]}, "has host bits set"),
        ({"azureStorage": {"account": "Team-Data"}}, "account"),
        ({"googleStorage": {"endpoint": "gs://x"}}, "endpoint"),
        ({"cloudIdentity": {"serviceAccountName": "data"}}, "provider"),
        ({"caConfigMap": {"name": "a", "key": "../x"}}, "key"),
    ],
)
def test_a_setting_that_no_client_could_follow_is_rejected(profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Profile.model_validate({"image": "example.org/trainer", **profile})
