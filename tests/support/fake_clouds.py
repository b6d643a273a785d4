"""Object stores of Google and of Azure on the loopback interface, and the servers that give pods credentials for them.

They check signatures: a service account's JWT, a shared key over each request, a shared access signature, and tokens
that they have issued. Objects are in memory. They answer the requests of obstore's client, after the documentation of
Google Cloud Storage's XML API and of Azure Blob Storage's REST API.
"""

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.support.services.serving import serving

BUCKET = "team"
ACCOUNT = "qloratest"
TENANT, CLIENT = "tenant", "client"
ROLE, SESSION = "arn:aws:iam::1:role/team", "canary-session"
MODIFIED = "Wed, 01 Jul 2026 00:00:00 GMT"


def _encoded(number: bytes) -> str:
    return base64.b64encode(number).decode()


@cache
def _private_key(_whose: str) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def foreign_key() -> rsa.RSAPrivateKey:
    """A key that none of these servers accepts."""
    return _private_key("another account's")


@dataclass
class FakeCloud:
    """A bucket, its users, and its requests."""

    objects: dict[str, bytes] = field(default_factory=dict)
    """By their names in BUCKET."""
    tokens: set[str] = field(default_factory=set)
    """Bearer tokens that the token servers have issued."""
    projected: str = "canary-projected-token"
    """The pod's own token, for which the token servers issue others."""
    seen: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    """Method, path with query, and headers in lower case of each request."""
    parts: dict[str, bytes] = field(default_factory=dict)
    """Parts of uploads that are not finished."""
    keys: tuple[str, str] = ("CANARYTEMPORARY", "canary-temporary-secret")
    """Access key and secret that STS and the agent of EKS give out."""
    address: str = ""
    """HOST:PORT."""
    service_account: rsa.RSAPrivateKey = field(default_factory=lambda: _private_key("the team's"))
    email: str = "team@project.iam.gserviceaccount.com"
    account_key: str = _encoded(b"canary-account-key-of-the-store!" * 2)

    def service_account_key(self, **more: object) -> str:
        """The JSON key of the service account, as gcloud writes it."""
        pem = self.service_account.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        key = {
            "type": "service_account",
            "private_key_id": "1",
            "private_key": pem.decode(),
            "client_email": self.email,
        }
        return json.dumps({**key, "project_id": "project", **more})

    def sas(self) -> str:
        """A shared access signature for the container, valid for all operations."""
        fields = {"sp": "rwdlc", "se": "2030-01-01T00:00:00Z", "spr": "https,http", "sv": "2022-11-02", "sr": "c"}
        query = "&".join(f"{name}={value.replace(':', '%3A')}" for name, value in fields.items())
        return f"?{query}&sig={self._sas_signature(fields).replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}"

    def is_sas(self, query: Mapping[str, str]) -> bool:
        return hmac.compare_digest(query.get("sig", ""), self._sas_signature(query))

    def _sas_signature(self, fields: Mapping[str, str]) -> str:
        resource = f"/blob/{ACCOUNT}/{BUCKET}"
        lines = [fields.get("sp", ""), "", fields.get("se", ""), resource, "", "", fields.get("spr", "")]
        return self._signed("\n".join([*lines, fields.get("sv", ""), fields.get("sr", ""), "", "", "", "", "", "", ""]))

    def shared_key(self, method: str, url: str, headers: Mapping[str, str]) -> str:
        length = headers.get("content-length", "")
        names = ("content-encoding", "content-language", "", "content-md5", "content-type", "date", "if-modified-since")
        more = ("if-match", "if-none-match", "if-unmodified-since", "range")
        lines = [method, *(headers.get(name, "") for name in names), *(headers.get(name, "") for name in more)]
        lines[3] = "" if length == "0" else length
        own = sorted((name, value) for name, value in headers.items() if name.startswith("x-ms-"))
        address = urlsplit(url)
        asked = sorted((name.lower(), value) for name, value in parse_qsl(address.query, keep_blank_values=True))
        resource = f"/{ACCOUNT}{address.path}" + "".join(f"\n{name}:{value}" for name, value in asked)
        text = "\n".join([*lines, *(f"{name}:{value}" for name, value in own), resource])
        return f"SharedKey {ACCOUNT}:{self._signed(text)}"

    def is_jwt(self, token: str) -> bool:
        """Whether the service account has signed this token for a storage scope."""
        try:
            signed, _, signature = token.rpartition(".")
            self.service_account.public_key().verify(
                _decoded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
            )
            claims = json.loads(_decoded(signed.partition(".")[2]))
        except (InvalidSignature, ValueError):
            return False
        return claims["iss"] == self.email and claims["scope"] == "https://www.googleapis.com/auth/cloud-platform"

    def _signed(self, text: str) -> str:
        return _encoded(hmac.new(base64.b64decode(self.account_key), text.encode(), hashlib.sha256).digest())

    def issue(self) -> str:
        token = f"canary-issued-{len(self.tokens)}"
        self.tokens.add(token)
        return token


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@contextmanager
def serve_cloud(cloud: FakeCloud, kind: str, *, tls: tuple[Path, Path] | None = None) -> Iterator[FakeCloud]:
    """Answer as `google`, `azure` or `aws` (its token servers only) on a free port until the block ends.

    `tls`: the server's certificate and its key, in PEM.
    """
    base = {"google": _Google, "azure": _Azure, "aws": _Aws}[kind]
    with serving(base, tls=tls, cloud=cloud) as cloud.address:
        yield cloud


class _Handler(BaseHTTPRequestHandler):
    cloud: FakeCloud

    def _any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked = {name.lower(): value for name, value in self.headers.items()}
        self.cloud.seen.append((self.command, self.path, self.asked))
        address = urlsplit(self.path)
        self.query = dict(parse_qsl(address.query, keep_blank_values=True))
        bucket, _, self.name = unquote(address.path).removeprefix("/").partition("/")
        if self.gives_token(address.path):
            return
        if not self.allowed():
            self.reply(403, _error("AuthenticationFailed"))
        elif bucket != BUCKET:
            self.reply(404, _error("ContainerNotFound"))
        else:
            self.answer()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815 - as the base class wants them

    def gives_token(self, path: str) -> bool:
        raise NotImplementedError

    def allowed(self) -> bool:
        return False

    def answer(self) -> None:
        """Nothing: a server of tokens has no objects."""

    def bearer(self) -> str:
        return str(self.asked.get("authorization", "")).removeprefix("Bearer ")

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send(self) -> None:
        content = self.cloud.objects.get(self.name)
        if content is None:
            self.reply(404, _error("BlobNotFound"))
            return
        etag, total = self.etag(content), len(content)
        if self.asked.get("if-match") not in (None, etag):
            self.reply(412, _error("ConditionNotMet"))
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.asked.get("range", ""))
        start, end = (int(found[1]), int(found[2] or total - 1)) if found else (0, total - 1)
        part = content[start : end + 1]
        headers = {"ETag": etag, "Last_Modified": MODIFIED, "x_ms_blob_type": "BlockBlob"}
        if found:
            headers["Content_Range"] = f"bytes {start}-{end}/{total}"
        self.reply(206 if found else 200, part, **headers)

    def etag(self, content: bytes) -> str:
        return ""

    def listing(self) -> list[tuple[str, bytes]]:
        prefix = self.query.get("prefix", "")
        return sorted((name, content) for name, content in self.cloud.objects.items() if name.startswith(prefix))

    def send_json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), Content_Type="application/json")

    def send_token(self) -> None:
        self.send_json({"access_token": self.cloud.issue(), "expires_in": 3600, "token_type": "Bearer"})


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()


class _Google(_Handler):
    """The XML API, and the metadata server of a node with workload identity."""

    def gives_token(self, path: str) -> bool:
        if not path.startswith("/computeMetadata/v1/instance/service-accounts/default/token"):
            return False
        if self.asked.get("metadata-flavor") != "Google":
            self.reply(403)
        else:
            self.send_token()
        return True

    def allowed(self) -> bool:
        return self.bearer() in self.cloud.tokens or self.cloud.is_jwt(self.bearer())

    def etag(self, content: bytes) -> str:
        return f'"{hashlib.md5(content).hexdigest()}"'

    def answer(self) -> None:
        if self.command == "GET" and not self.name:
            self._list()
        elif self.command in ("GET", "HEAD"):
            self.send()
        elif self.command == "DELETE":
            self.reply(204 if self.cloud.objects.pop(self.name, None) is not None else 404)
        elif self.command == "POST" and "uploads" in self.query:
            self.reply(200, b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>")
        elif self.command == "PUT" and "uploadId" in self.query:
            self.cloud.parts[self.query["partNumber"].zfill(5)] = self.body
            self.reply(200, ETag=self.etag(self.body))
        elif self.command == "POST":
            self._keep(b"".join(part for _, part in sorted(self.cloud.parts.items())))
            self.cloud.parts.clear()
        elif self.asked.get("x-goog-if-generation-match") == "0" and self.name in self.cloud.objects:
            self.reply(412, _error("PreconditionFailed"))
        else:
            self._keep(self.body)

    def _keep(self, content: bytes) -> None:
        self.cloud.objects[self.name] = content
        etag = self.etag(content)
        body = f"<CompleteMultipartUploadResult><ETag>{escape(etag)}</ETag></CompleteMultipartUploadResult>".encode()
        self.reply(200, body if self.command == "POST" else b"", ETag=etag, x_goog_generation="1")

    def _list(self) -> None:
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(content)}</Size><ETag>{escape(self.etag(content))}</ETag>"
            "<LastModified>2026-07-01T00:00:00.000Z</LastModified></Contents>"
            for name, content in self.listing()
        )
        self.reply(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode(), Content_Type="application/xml")


class _Azure(_Handler):
    """Azure Blob Storage, and the tenant's token server."""

    def gives_token(self, path: str) -> bool:
        if path != f"/{TENANT}/oauth2/v2.0/token":
            return False
        form = {name: values[0] for name, values in parse_qs(self.body.decode()).items()}
        wanted = {
            "client_id": CLIENT,
            "client_assertion": self.cloud.projected,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "grant_type": "client_credentials",
            "scope": "https://storage.azure.com/.default",
        }
        if form != wanted:
            self.reply(401, json.dumps({"error": "invalid_client"}).encode())
        else:
            self.send_token()
        return True

    def allowed(self) -> bool:
        given = self.asked.get("authorization", "")
        if given.startswith("SharedKey "):
            return hmac.compare_digest(given, self.cloud.shared_key(self.command, self.path, self.asked))
        return self.bearer() in self.cloud.tokens if given else self.cloud.is_sas(self.query)

    def etag(self, content: bytes) -> str:
        return f'"0x8D{hashlib.md5(content).hexdigest()[:13].upper()}"'

    def answer(self) -> None:
        if self.query.get("comp") == "list":
            self._list()
        elif self.command in ("GET", "HEAD"):
            self.send()
        elif self.command == "DELETE":
            self.reply(202 if self.cloud.objects.pop(self.name, None) is not None else 404)
        elif self.query.get("comp") == "batch":
            self._delete_many()
        elif self.query.get("comp") == "block":
            self.cloud.parts[self.query["blockid"]] = self.body
            self.reply(201)
        elif self.query.get("comp") == "blocklist":
            blocks = re.findall(r"<(?:Uncommitted|Latest)>([^<]+)</", self.body.decode())
            self._keep(b"".join(self.cloud.parts.pop(block) for block in blocks))
        elif self.asked.get("if-none-match") == "*" and self.name in self.cloud.objects:
            self.reply(409, _error("BlobAlreadyExists"))
        else:
            self._keep(self.body)

    def _delete_many(self) -> None:
        """Each part of the body is a separate request with a separate signature."""
        boundary = self.asked["content-type"].partition("boundary=")[2]
        answers = ""
        for number, part in enumerate(self.body.decode().split(f"--{boundary}")[1:-1]):
            first, *lines = part.strip().split("\r\n\r\n", 1)[1].split("\r\n")
            path = first.split(" ")[1]
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines) if name}
            signed = headers.get("authorization") == self.cloud.shared_key("DELETE", path, headers)
            token = headers.get("authorization", "").removeprefix("Bearer ") in self.cloud.tokens
            if not (signed or token or self.cloud.is_sas(dict(parse_qsl(urlsplit(path).query)))):
                status = "403 Forbidden"
            else:
                name = unquote(urlsplit(path).path).removeprefix(f"/{BUCKET}/")
                status = "202 Accepted" if self.cloud.objects.pop(name, None) is not None else "404 Not Found"
            answers += f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\n"
            answers += f"HTTP/1.1 {status}\r\nx-ms-request-id: {number}\r\n\r\n\r\n"
        self.reply(202, f"{answers}--{boundary}--".encode(), Content_Type=f"multipart/mixed; boundary={boundary}")

    def _keep(self, content: bytes) -> None:
        self.cloud.objects[self.name] = content
        self.reply(201, ETag=self.etag(content), Last_Modified=MODIFIED)

    def _list(self) -> None:
        entries = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
            f"<Content-Length>{len(content)}</Content-Length><Content-Type>application/octet-stream</Content-Type>"
            f"<Etag>{escape(self.etag(content))}</Etag></Properties></Blob>"
            for name, content in self.listing()
        )
        body = f"<EnumerationResults><Blobs>{entries}</Blobs><NextMarker /></EnumerationResults>"
        self.reply(200, body.encode(), Content_Type="application/xml")


class _Aws(_Handler):
    """The Security Token Service, and the agent of EKS Pod Identity."""

    def gives_token(self, path: str) -> bool:
        access, secret = self.cloud.keys
        sent = self.query | dict(parse_qsl(self.body.decode()))
        if path == "/v1/credentials" and self.asked.get("authorization") == self.cloud.projected:
            keys = {"AccessKeyId": access, "SecretAccessKey": secret, "Token": SESSION}
            self.send_json({**keys, "Expiration": "2030-01-01T00:00:00Z"})
        elif (sent.get("Action"), sent.get("WebIdentityToken")) == (
            "AssumeRoleWithWebIdentity",
            self.cloud.projected,
        ) and sent.get("RoleArn") == ROLE:
            given = f"<AccessKeyId>{access}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>"
            given += f"<SessionToken>{SESSION}</SessionToken><Expiration>2030-01-01T00:00:00Z</Expiration>"
            role = f"<Credentials>{given}</Credentials></AssumeRoleWithWebIdentityResult>"
            answer = f"<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult>{role}"
            self.reply(200, f"{answer}</AssumeRoleWithWebIdentityResponse>".encode(), Content_Type="text/xml")
        else:
            self.reply(403, _error("AccessDenied"))
        return True
