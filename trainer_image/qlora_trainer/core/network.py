"""Lets all clients of servers trust the administrator's certificates and use the administrator's proxy.

The libraries agree on a few environment variables, so these are set once, before a library is loaded: SSL_CERT_FILE for
OpenSSL, httpx and the object stores' client, REQUESTS_CA_BUNDLE for requests, HTTPS_PROXY and NO_PROXY for all.
"""

import os
import re
import ssl
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, ip_address
from pathlib import Path
from urllib.parse import quote, urlsplit

import certifi

from qlora_api import contract
from qlora_api.printable import one_line, shortened
from qlora_trainer.core.failures import bad_configuration, unreachable

NOT_TRUSTED = (
    "its certificate is from no authority that is trusted; ask the administrator to set caConfigMap of the profile"
)
"""What to do about a server of a company's own certificate authority."""
_REJECTED = "CERTIFICATE_VERIFY_FAILED"
_TUNNEL = re.compile(r"(?:Tunnel connection failed|ProxyError): (\d{3} [A-Za-z ]{1,60})")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?(?:-----END CERTIFICATE-----|\Z)", re.DOTALL)
_BUNDLE_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


def use_network(environment: MutableMapping[str, str], scratch: Path) -> None:
    """Apply the profile's network settings, if it has any. Call it before libraries load.

    `scratch` is a folder of this pod only. Raises StepFailure: UNREACHABLE if the ConfigMap or the Secret is not
    there, BAD_CONFIGURATION if it holds no certificates, the Secret no text, or the proxy is not reached by http://.
    """
    if authority := environment.get(contract.ENV_CA_FILE):
        bundle = scratch / "ca-bundle.pem"
        public = Path(certifi.where()).read_text(encoding="utf-8")
        bundle.write_text(f"{public}\n{_certificates(Path(authority))}\n", encoding="utf-8")
        environment.update(dict.fromkeys(_BUNDLE_VARIABLES, str(bundle)))
    if secret := environment.get(contract.ENV_PROXY_SECRET):
        environment["HTTPS_PROXY"] = _with_login(environment.get("HTTPS_PROXY", ""), Path(secret))
    if https_proxy(environment) or authority:
        # The hub's accelerated transfer has another HTTP client, with different roots and proxy rules.
        environment["HF_HUB_DISABLE_XET"] = "1"


def _certificates(file: Path) -> str:
    """The certificates in PEM of the mounted key, without the text around them."""
    named = f"ConfigMap {file.parent.name!r} with key {file.name!r} (caConfigMap of the profile)"
    if not file.is_file():
        raise unreachable(f"{named} does not exist in the job's namespace: ask the administrator to create it there")
    try:
        text = "\n".join(_PEM.findall(file.read_bytes().decode("ascii", errors="replace")))
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError, TypeError) as error:
        found = error.reason if isinstance(error, ssl.SSLError) and error.reason else "no certificate"
        raise bad_configuration(
            f"{named} holds no certificates in PEM that can be read ({found}): ask the administrator to store the "
            "certificates of your certificate authority there, each from BEGIN CERTIFICATE to END CERTIFICATE"
        ) from error
    return text


def _with_login(proxy: str, folder: Path) -> str:
    """The proxy's address with the user and password of the mounted Secret."""
    values = {}
    for key in contract.PROXY_KEYS:
        try:
            values[key] = (folder / key).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise bad_configuration(
                f"key {key} of Secret {folder.name!r} (proxySecretName of the profile) is not UTF-8 text"
            ) from None
        except FileNotFoundError as missing:
            raise unreachable(
                f"Secret {folder.name!r} with {key} (proxySecretName of the profile) does not exist in the job's "
                "namespace: ask the administrator to create it there"
            ) from missing
    scheme, _, host = proxy.partition("://")
    return f"{scheme}://{quote(values['username'], safe='')}:{quote(values['password'], safe='')}@{host}"


@dataclass(frozen=True)
class Proxy:
    """The proxy for https:// addresses."""

    url: str = field(repr=False)
    """With the credentials, which no message shows."""
    direct: tuple[str, ...] = ()
    """Hosts to reach without it: a profile's `noProxy`, or NO_PROXY on a laptop."""

    def serves(self, url: str) -> bool:
        """Whether requests to this address go through the proxy."""
        address = urlsplit(url)
        host = (address.hostname or "").rstrip(".")
        return address.scheme == "https" and not any(_is_at(host, entry) for entry in self.direct)


def https_proxy(environment: Mapping[str, str]) -> Proxy | None:
    """The proxy of the environment, also where a user of this machine has set one, or None.

    Raises StepFailure BAD_CONFIGURATION for one that is not reached by http://, as clients differ in whether they then
    send the password in plain text.
    """
    name = "HTTPS_PROXY" if environment.get("HTTPS_PROXY") else "https_proxy"
    url = environment.get(name)
    if not url:
        return None
    scheme = url.partition("://")[0] if "://" in url else "http"
    if scheme.lower() != "http":
        raise bad_configuration(
            f"{name} names a proxy by {shortened(one_line(scheme), 20)}://, must be http:// (what goes through "
            "it is encrypted from here to the server): set the proxy's address with http://"
        )
    direct = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    return Proxy(url if "://" in url else f"http://{url}", tuple(direct.lower().replace(" ", "").split(",")))


def trouble(url: str, error: str) -> str:
    """The end of a sentence on the way to the server at `url`, or an empty string."""
    if _REJECTED in error:
        return f": {NOT_TRUSTED}"
    proxy, answer = https_proxy(os.environ), _TUNNEL.search(error)
    if proxy is None or not proxy.serves(url):
        return ""
    return f", through the proxy ({answer[1].strip()})" if answer else ", through the proxy"


def _is_at(host: str, entry: str) -> bool:
    """Whether the host is the entry or below it, or in its network."""
    try:
        address = ip_address(host)
    except ValueError:
        name = entry.removeprefix("*").removeprefix(".")
        return entry == "*" or (name != "" and (host == name or host.endswith(f".{name}")))
    try:
        return isinstance(address, IPv4Address) and address in IPv4Network(entry, strict=False)
    except ValueError:
        return entry in ("*", host)
