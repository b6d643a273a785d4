"""Makes and accepts signatures; tests/cluster/test_release.py runs cosign."""

import json
from pathlib import Path

import pytest

from release.project import ReleaseError
from release.signing import PREDICATE_TYPES, Cosign, Identity, Keyless, KeyPair, PublicKey

WORKFLOW = "https://github.com/qlora-operator/qlora-operator/.github/workflows/release.yaml@refs/tags/v0.1.0"


def test_a_keyless_signature_must_be_of_one_workflow_and_in_the_public_log() -> None:
    signer = Keyless(Identity(WORKFLOW))
    assert signer.signing() == ["--yes"]
    options = signer.verifier.verifying()
    assert options == [
        "--certificate-identity",
        WORKFLOW,
        "--certificate-oidc-issuer",
        "https://token.actions.githubusercontent.com",
    ]


def test_a_key_is_verified_with_its_public_part_only() -> None:
    pair = KeyPair(Path("cosign.key"), Path("cosign.pub"), "secret")
    assert "cosign.key" in pair.signing()
    assert "cosign.key" not in " ".join(pair.verifier.verifying())
    assert "secret" not in repr(pair)


def test_artifacts_are_signed_with_an_existing_key_or_not_at_all(tmp_path: Path) -> None:
    cosign = Cosign(tmp_path / "no-program")
    with pytest.raises(ReleaseError, match=r"no key .*cosign\.key to sign what ghcr\.io/team publishes"):
        cosign.key_pair(tmp_path, "", "ghcr.io/team")
    (tmp_path / "cosign.key").touch()
    assert cosign.key_pair(tmp_path, "", "ghcr.io/team").public == tmp_path / "cosign.pub"


@pytest.mark.parametrize("signed", [True, False])
def test_signed_statements_are_no_signature_although_cosign_accepts_them(tmp_path: Path, signed: bool) -> None:
    types = [*PREDICATE_TYPES.values(), *(["https://sigstore.dev/cosign/sign/v1"] if signed else [])]
    program = tmp_path / "cosign"
    program.write_text(f"#!/bin/sh\necho '{json.dumps([{'critical': {'type': each}} for each in types])}'\n")
    program.chmod(0o755)
    assert Cosign(program).is_signed(PublicKey(tmp_path / "cosign.pub"), f"registry/image@sha256:{'a' * 64}") is signed
