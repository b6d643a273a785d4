"""The certificates and the proxy of a profile, as a step's process takes them over."""

import ssl
from pathlib import Path

import certifi
import pytest

from qlora_api import contract
from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.network import Proxy, https_proxy, use_network
from tests.support.services.enterprise import company_certificates


def rejected(environment: dict[str, str], scratch: Path) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        use_network(environment, scratch)
    return failure.value


def test_own_certificates_are_added_to_the_public_ones(tmp_path: Path) -> None:
    environment = {contract.ENV_CA_FILE: str(company_certificates(tmp_path).authority)}
    use_network(environment, tmp_path)
    assert environment["SSL_CERT_FILE"] == environment["REQUESTS_CA_BUNDLE"]

    def subjects(file: str) -> list[object]:
        return [found["subject"] for found in ssl.create_default_context(cafile=file).get_ca_certs()]

    own = ((("commonName", "devcluster"),),)
    assert sorted(map(str, subjects(environment["SSL_CERT_FILE"]))) == sorted(
        map(str, [*subjects(certifi.where()), own])
    )


@pytest.mark.parametrize("text", ["\ufeff", "# Müller GmbH, Wurzelzertifikat\n", "\u2028Caché\n"])
def test_text_around_the_certificates_may_be_of_any_language(tmp_path: Path, text: str) -> None:
    file = company_certificates(tmp_path).authority
    file.write_text(text + file.read_text() + text, encoding="utf-8")
    environment = {contract.ENV_CA_FILE: str(file)}
    use_network(environment, tmp_path)
    found = ssl.create_default_context(cafile=environment["SSL_CERT_FILE"]).get_ca_certs()
    assert ((("commonName", "devcluster"),),) in [entry["subject"] for entry in found]


def test_without_settings_nothing_is_changed(tmp_path: Path) -> None:
    environment = {"HOME": "/tmp"}
    use_network(environment, tmp_path)
    assert environment == {"HOME": "/tmp"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a certificate",
        b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\ncanary\n-----END PRIVATE KEY-----\n",
        b"\xff\xfe\x00",
    ],
)
def test_an_invalid_certificate_is_rejected_with_its_source(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "company-ca").mkdir()
    file = tmp_path / "company-ca" / "bundle.pem"
    file.write_bytes(content)
    failure = rejected({contract.ENV_CA_FILE: str(file)}, tmp_path)
    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert failure.message.startswith(
        "ConfigMap 'company-ca' with key 'bundle.pem' (caConfigMap of the profile) holds no certificates in PEM"
    )
    assert "canary" not in failure.message


def test_a_good_certificate_before_a_damaged_one_is_not_enough(tmp_path: Path) -> None:
    file = company_certificates(tmp_path).authority
    file.write_text(file.read_text() + "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    assert rejected({contract.ENV_CA_FILE: str(file)}, tmp_path).exit_code is ExitCode.BAD_CONFIGURATION


def test_a_missing_config_map_is_waited_for(tmp_path: Path) -> None:
    failure = rejected({contract.ENV_CA_FILE: "/ca/company-ca/ca.crt"}, tmp_path)
    assert failure.exit_code is ExitCode.UNREACHABLE
    assert failure.message.startswith("ConfigMap 'company-ca' with key 'ca.crt' (caConfigMap of the profile) does not")


def test_the_proxys_password_is_put_into_its_address_and_into_no_text(tmp_path: Path) -> None:
    (tmp_path / "username").write_text("team\n")
    (tmp_path / "password").write_text("a/b:c@d e\n")
    environment = {"HTTPS_PROXY": "http://proxy.example.org:3128", contract.ENV_PROXY_SECRET: str(tmp_path)}
    use_network(environment, tmp_path)
    assert environment["HTTPS_PROXY"] == "http://team:a%2Fb%3Ac%40d%20e@proxy.example.org:3128"
    assert "a%2Fb" not in repr(https_proxy(environment))
    (tmp_path / "password").unlink()
    failure = rejected({**environment, contract.ENV_PROXY_SECRET: str(tmp_path)}, tmp_path)
    assert failure.exit_code is ExitCode.UNREACHABLE
    assert f"Secret {tmp_path.name!r} with password (proxySecretName of the profile) does not exist" in failure.message


@pytest.mark.parametrize(
    ("url", "entry", "through"),
    [
        ("https://hub.example.org/x", "example.org", False),
        ("https://example.org", "example.org", False),
        ("https://EXAMPLE.org.", "example.org", False),
        ("https://badexample.org", "example.org", True),
        ("https://example.org.evil.test", "example.org", True),
        ("https://10.1.2.3:8443", "10.0.0.0/8", False),
        ("https://10.1.2.3:8443", "10.1.2.3", False),
        ("https://11.1.2.3", "10.0.0.0/8", True),
        ("https://hub.example.org", "10.0.0.0/8", True),
        ("https://[::1]/x", "10.0.0.0/8", True),
        ("http://hub.example.org", "nowhere.test", False),
        # As users of a laptop write NO_PROXY.
        ("https://hub.example.org", ".example.org", False),
        ("https://hub.example.org", "*", False),
        ("https://hub.example.org", "", True),
    ],
)
def test_no_proxy_selects_the_addresses_of_the_proxy(url: str, entry: str, through: bool) -> None:
    proxy = https_proxy({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": f"other.test, {entry}"})
    assert proxy is not None
    assert proxy.serves(url) is through


def test_without_a_proxy_setting_no_proxy_is_used() -> None:
    assert https_proxy({}) is None
    assert https_proxy({"https_proxy": "proxy:3128"}) == Proxy("http://proxy:3128", ("",))


@pytest.mark.parametrize(("name", "scheme"), [("HTTPS_PROXY", "https"), ("https_proxy", "socks5")])
def test_a_proxy_that_would_get_the_password_in_another_way_is_rejected(name: str, scheme: str) -> None:
    with pytest.raises(StepFailure, match=f"{name} names a proxy by {scheme}://, must be http://") as failure:
        https_proxy({name: f"{scheme}://team:canary@proxy.example.org:3128"})
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert "canary" not in failure.value.message


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
def test_the_hub_is_not_reached_around_the_proxy(tmp_path: Path, name: str) -> None:
    environment = {name: "http://proxy.example.org:3128"}
    use_network(environment, tmp_path)
    assert environment["HF_HUB_DISABLE_XET"] == "1"
