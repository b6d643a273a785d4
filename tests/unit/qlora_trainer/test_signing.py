"""Signatures of statements: the same each time, and only for the signed statement."""

from base64 import b64encode

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from qlora_trainer.publishing.signing import (
    PrivateKey,
    payload_of,
    read_private_key,
    read_public_key,
    sign,
    verify_bundle,
)

KEYS: dict[str, PrivateKey] = {"ecdsa": generate_private_key(SECP256R1()), "ed25519": Ed25519PrivateKey.generate()}


@pytest.mark.parametrize("kind", KEYS)
def test_a_signature_verifies_with_its_public_key_only(kind: str) -> None:
    key = KEYS[kind]
    read = read_private_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    bundle = sign(b"statement", read)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    assert sign(b"statement", read) == bundle
    assert verify_bundle(bundle, read_public_key(public)) == payload_of(bundle) == b"statement"
    for other in (Ed25519PrivateKey.generate(), generate_private_key(SECP256R1())):
        with pytest.raises(ValueError, match="no signature is of this key"):
            verify_bundle(bundle, other.public_key())


@pytest.mark.parametrize(
    "bundle", [b"", b"[]", b"{}", b'{"dsseEnvelope": 1}', b'{"dsseEnvelope": {"payloadType": "a"}}']
)
def test_an_invalid_bundle_is_rejected(bundle: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        payload_of(bundle)


def test_a_key_with_a_password_or_of_another_kind_is_rejected() -> None:
    encrypted = KEYS["ecdsa"].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    other = generate_private_key(SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem in (encrypted, other, b"no key"):
        with pytest.raises(ValueError, match="ECDSA P-256 or Ed25519"):
            read_private_key(pem)


def test_a_key_of_a_curve_that_the_library_lacks_is_rejected() -> None:
    key = generate_private_key(SECP256R1())
    # P-256 has the identifier 1.2.840.10045.3.1.7; 3.1.127 is no curve.
    known, unknown = b"\x2a\x86\x48\xce\x3d\x03\x01\x07", b"\x2a\x86\x48\xce\x3d\x03\x01\x7f"
    private = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()).replace(known, unknown)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo).replace(known, unknown)
    for read, label, content in ((read_private_key, "PRIVATE", private), (read_public_key, "PUBLIC", public)):
        pem = f"-----BEGIN {label} KEY-----\n{b64encode(content).decode()}\n-----END {label} KEY-----\n"
        with pytest.raises(ValueError, match="ECDSA P-256 or Ed25519"):
            read(pem.encode())
