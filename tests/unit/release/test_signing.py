"""Whose signature is made and accepted; that cosign does so is shown by tests/cluster/test_release.py."""

from pathlib import Path

from release.signing import Identity, Keyless, KeyPair

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
