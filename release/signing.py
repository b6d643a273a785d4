"""Signs and verifies with cosign: with a key pair on this machine, or keyless with the identity of a workflow."""

import base64
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from release.project import ReleaseError, on_loopback

GITHUB_ISSUER = "https://token.actions.githubusercontent.com"
"""The authority for the identity of a workflow."""
# cosign's names of predicates, and the types that they stand for in a statement.
PROVENANCE = "slsaprovenance1"
SBOM = "spdxjson"
PREDICATE_TYPES = {PROVENANCE: "https://slsa.dev/provenance/v1", SBOM: "https://spdx.dev/Document"}
# The type of `cosign sign`.
_SIGNATURE_TYPE = "https://sigstore.dev/cosign/sign/v1"
_SECONDS = 600.0


class Verifier(Protocol):
    """The expected signer of a user."""

    def verifying(self) -> list[str]:
        """Options of `cosign verify` and `cosign verify-attestation`."""


class Signer(Protocol):
    """A signer."""

    def signing(self) -> list[str]:
        """Options of `cosign sign` and `cosign attest`."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for cosign, in addition to those of this process."""

    @property
    def verifier(self) -> Verifier:
        """The verifier of these signatures."""


@dataclass(frozen=True)
class PublicKey:
    """A signature by a key's owner, without an entry in a public log."""

    file: Path

    def verifying(self) -> list[str]:
        """See Verifier."""
        return ["--key", str(self.file), "--insecure-ignore-tlog"]


@dataclass(frozen=True)
class Identity:
    """A keyless signature: sigstore's certificate of this identity, and a log entry."""

    subject: str
    issuer: str = GITHUB_ISSUER

    def verifying(self) -> list[str]:
        """See Verifier."""
        return ["--certificate-identity", self.subject, "--certificate-oidc-issuer", self.issuer]


@dataclass(frozen=True)
class KeyPair:
    """A key pair on this machine. Nothing is written to a public log."""

    private: Path
    public: Path
    password: str = field(default="", repr=False)

    def signing(self) -> list[str]:
        """See Signer."""
        return ["--key", str(self.private), "--use-signing-config=false", "--tlog-upload=false"]

    @property
    def environment(self) -> Mapping[str, str]:
        """See Signer."""
        return {"COSIGN_PASSWORD": self.password}

    @property
    def verifier(self) -> Verifier:
        """See Signer."""
        return PublicKey(self.public)


@dataclass(frozen=True)
class Keyless:
    """The identity of the platform's token, as GitHub Actions' `id-token: write`."""

    identity: Identity

    def signing(self) -> list[str]:
        """See Signer."""
        return ["--yes"]

    @property
    def environment(self) -> Mapping[str, str]:
        """See Signer."""
        return {}

    @property
    def verifier(self) -> Verifier:
        """See Signer."""
        return self.identity


@dataclass(frozen=True)
class Cosign:
    """The program."""

    program: Path

    def key_pair(self, folder: Path, password: str, registry: str | None = None) -> KeyPair:
        """The key pair in a folder, created if missing and the registry is local.

        Raises ReleaseError for a registry of others: users have the public part of one key, and not of a new one.
        """
        pair = KeyPair(folder / "cosign.key", folder / "cosign.pub", password)
        if not pair.private.exists():
            if registry is not None and not on_loopback(registry):
                raise ReleaseError(
                    f"no key {pair.private} to sign what {registry} publishes: put the key pair of your releases there "
                    "as cosign.key and cosign.pub, and its password into COSIGN_PASSWORD"
                )
            folder.mkdir(parents=True, exist_ok=True)
            prefix = f"--output-key-prefix={folder / 'cosign'}"
            self._run(["generate-key-pair", prefix], pair.environment)
        return pair

    def sign(self, signer: Signer, reference: str) -> None:
        """Sign the artifact of a digest, once. Raises ReleaseError with cosign's message."""
        if not self.is_signed(signer.verifier, reference):
            self._run(["sign", *signer.signing(), reference], signer.environment)

    def is_signed(self, verifier: Verifier, reference: str) -> bool:
        """Whether there is a valid signature."""
        try:
            self.verify(verifier, reference)
        except ReleaseError:
            return False
        return True

    def verify(self, verifier: Verifier, reference: str) -> None:
        """Raise ReleaseError unless there is a valid signature. A statement is none."""
        said = self._run(["verify", *verifier.verifying(), reference], {})
        types = {found["critical"]["type"] for found in json.loads(said)}
        if _SIGNATURE_TYPE not in types:
            raise ReleaseError(
                f"{reference}: cosign verify found {', '.join(sorted(types))}, expected {_SIGNATURE_TYPE}: "
                "sign it with `cosign sign`"
            )

    def attest(self, signer: Signer, reference: str, kind: str, predicate: Path) -> None:
        """Sign a statement about the artifact, unless the signer has signed this one."""
        stated = json.loads(predicate.read_text())
        if stated not in self.attested(signer.verifier, reference, kind):
            command = ["attest", *signer.signing(), "--type", kind, "--predicate", str(predicate), reference]
            self._run(command, signer.environment)

    def attested(self, verifier: Verifier, reference: str, kind: str) -> list[dict[str, Any]]:
        """Return the kind's predicates with a valid signature about this digest, or none."""
        try:
            return self.verified_predicates(verifier, reference, kind)
        except ReleaseError:
            return []

    def verified_predicates(self, verifier: Verifier, reference: str, kind: str) -> list[dict[str, Any]]:
        """As `attested`; raises ReleaseError with cosign's message where there is none."""
        said = self._run(["verify-attestation", *verifier.verifying(), "--type", kind, reference], {})
        statements = [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in said.splitlines()]
        return [_predicate(statement, reference, kind) for statement in statements]

    def _run(self, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
        done = subprocess.run(
            [self.program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**os.environ, **environment},
            check=False,
        )
        if done.returncode != 0:
            raise ReleaseError(f"cosign {' '.join(arguments)}:\n{done.stderr.strip()[-2000:]}")
        return done.stdout


def _predicate(statement: Mapping[str, Any], reference: str, kind: str) -> dict[str, Any]:
    """Return the predicate of a statement of this digest and kind, checked by cosign."""
    digests = [f"sha256:{subject['digest'].get('sha256')}" for subject in statement["subject"]]
    if digests != [reference.rpartition("@")[2]] or statement["predicateType"] != PREDICATE_TYPES[kind]:
        raise ReleaseError(f"{reference}: a statement of type {statement['predicateType']} about {digests}")
    return dict(statement["predicate"])
