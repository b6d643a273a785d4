"""Users of an OIDC issuer: a real API server that trusts one, and a door in each mode."""

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from devcluster.addresses import DNS_DOMAIN, LOOPBACK, free_port
from devcluster.certificates import Authority
from devcluster.controlplane import ControlPlane, running
from tests.support.cluster.nodeless import DEFAULT_PROFILE, apply_definitions
from tests.support.door import AUDIENCE, MODEL, TEMPLATE, DoorProcess, add_tenant, running_door, upload

API = f"https://kubernetes.default.svc.{DNS_DOMAIN}"


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class Issuer:
    """An OIDC issuer on loopback, and the tokens that it gives out."""

    def __init__(self, port: int) -> None:
        self.url = f"https://{LOOPBACK}:{port}"
        self._key = rsa.generate_private_key(65537, 2048)

    def document(self, path: str) -> dict[str, Any]:
        """The discovery document, or the keys."""
        if path == "/keys":
            numbers = self._key.public_key().public_numbers()
            parts = {"n": numbers.n.to_bytes(256, "big"), "e": numbers.e.to_bytes(3, "big")}
            values = {name: encoded(value) for name, value in parts.items()}
            return {"keys": [{"kty": "RSA", "alg": "RS256", "use": "sig", "kid": "one", **values}]}
        return {"issuer": self.url, "jwks_uri": f"{self.url}/keys", "id_token_signing_alg_values_supported": ["RS256"]}

    def token(self, user: str, groups: list[str], *, seconds: int = 600, audience: str = AUDIENCE) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": audience, "sub": user, "groups": groups, "iat": now, "exp": now + seconds}
        header = {"alg": "RS256", "kid": "one"}
        signed = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{signed}.{encoded(signature)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oidc")


@pytest.fixture(scope="module")
def issuer(folder: Path) -> Iterator[Issuer]:
    port = free_port()
    issuer, authority = Issuer(port), Authority(datetime.now(UTC))
    authority.issue("issuer", serves=[LOOPBACK]).write(folder, "issuer")
    (folder / "ca.crt").write_bytes(authority.certificate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(issuer.document(self.path)).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "issuer.crt", folder / "issuer.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield issuer
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def trusting(folder: Path, issuer: Issuer) -> Iterator[ControlPlane]:
    """An API server that trusts the issuer, with a namespace that the group team-a may use."""
    stated = {"url": issuer.url, "audiences": [AUDIENCE], "certificateAuthority": (folder / "ca.crt").read_text()}
    claims = {"username": {"claim": "sub", "prefix": "oidc:"}, "groups": {"claim": "groups", "prefix": "oidc:"}}
    configuration = {
        "apiVersion": "apiserver.config.k8s.io/v1",
        "kind": "AuthenticationConfiguration",
        "jwt": [{"issuer": stated, "claimMappings": claims}],
    }
    path = folder / "authentication.yaml"
    path.write_text(yaml.safe_dump(configuration))
    options = [f"--authentication-config={path}", f"--api-audiences={API},{AUDIENCE}"]
    with running(api_options=options) as plane:
        apply_definitions(plane, default=DEFAULT_PROFILE)
        add_tenant(plane, "team-a")
        binding = ("rolebinding", "oidc", "--role=trainer", "--group=oidc:team-a", "--namespace=team-a")
        plane.kubectl("create", *binding)
        yield plane


@pytest.fixture(scope="module", params=["impersonate", "token"])
def door(request: pytest.FixtureRequest, folder: Path, trusting: ControlPlane) -> Iterator[DoorProcess]:
    settings = {"identity": request.param, "models": {MODEL: {"spec": TEMPLATE}}}
    with running_door(folder / request.param, trusting, settings) as door:
        yield door


def test_a_user_has_the_rights_of_the_groups(door: DoorProcess, issuer: Issuer, trusting: ControlPlane) -> None:
    client = door.client(issuer.token("alice", ["team-a"]), project="team-a")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client)).id
    with trusting.audit_log.open() as log:
        entries = [json.loads(line) for line in log if job in line]
    users = {(each.get("impersonatedUser") or each["user"])["username"] for each in entries}
    assert users == {"oidc:alice"}
    with pytest.raises(openai.PermissionDeniedError, match="oidc:mallory"):
        door.client(issuer.token("mallory", ["team-b"]), project="team-a").fine_tuning.jobs.retrieve(job)


def test_a_group_of_the_system_cannot_be_claimed(door: DoorProcess, issuer: Issuer) -> None:
    client = door.client(issuer.token("mallory", ["system:masters"]), project="team-a")
    with pytest.raises(openai.PermissionDeniedError):
        client.files.list()


def test_a_user_names_the_namespace(door: DoorProcess, issuer: Issuer) -> None:
    with pytest.raises(openai.BadRequestError, match="project"):
        door.client(issuer.token("alice", ["team-a"])).files.list()


@pytest.mark.parametrize("change", [{"seconds": -60}, {"audience": "another"}])
def test_an_expired_or_foreign_token_is_no_key(door: DoorProcess, issuer: Issuer, change: dict[str, Any]) -> None:
    with pytest.raises(openai.AuthenticationError):
        door.client(issuer.token("alice", ["team-a"], **change), project="team-a").files.list()
