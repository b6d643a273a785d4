"""Signs statements as DSSE envelopes in sigstore bundles, and verifies these: with a key, and without a log.

Sources: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md, and
https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_bundle.proto for the bundle.
"""

import base64
import json
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_ALLOWED = "a key of ECDSA P-256 or Ed25519 in PEM"

PrivateKey = EllipticCurvePrivateKey | Ed25519PrivateKey
PublicKey = EllipticCurvePublicKey | Ed25519PublicKey


def read_private_key(pem: bytes) -> PrivateKey:
    """Read a PEM file's key. Raises ValueError unless allowed and without password."""
    try:
        key = load_pem_private_key(pem, password=None)
    # The library raises TypeError for a key with a password, and UnsupportedAlgorithm for a curve that it lacks.
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"must be {_ALLOWED} (PKCS #8, not encrypted)") from error
    if isinstance(key, PrivateKey) and _is_allowed(key):
        return key
    raise ValueError(f"must be {_ALLOWED}, and is another kind of key")


def read_public_key(pem: bytes) -> PublicKey:
    """The key in a PEM file. Raises ValueError for anything but an allowed key."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"must be the public part of {_ALLOWED}") from error
    if isinstance(key, PublicKey) and _is_allowed(key):
        return key
    raise ValueError(f"must be the public part of {_ALLOWED}, and is another kind of key")


def _is_allowed(key: PrivateKey | PublicKey) -> bool:
    return isinstance(key, Ed25519PrivateKey | Ed25519PublicKey) or isinstance(key.curve, SECP256R1)


def sign(payload: bytes, key: PrivateKey) -> bytes:
    """The bundle of a statement, JSON. The same key gives the same bytes."""
    encoded = _pre_authentication_encoding(payload)
    if isinstance(key, Ed25519PrivateKey):
        signature = key.sign(encoded)
    else:
        # RFC 6979: without randomness.
        signature = key.sign(encoded, ECDSA(SHA256(), deterministic_signing=True))
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(key.public_key())}},
        "dsseEnvelope": {
            "payload": _text(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _text(signature)}],
        },
    }
    return json.dumps(bundle, sort_keys=True).encode() + b"\n"


def payload_of(bundle: bytes) -> bytes:
    """The statement in a bundle, not verified. Raises ValueError without one."""
    return _open(bundle)[0]


def verify_bundle(bundle: bytes, key: PublicKey) -> bytes:
    """The statement in a bundle, verified with this key.

    Raises ValueError if another key has signed it, or it is no such bundle.
    """
    payload, signatures = _open(bundle)
    encoded = _pre_authentication_encoding(payload)
    if not any(_is_of(key, signature, encoded) for signature in signatures):
        raise ValueError("no signature is of this key, or the statement was changed afterwards")
    return payload


def _open(bundle: bytes) -> tuple[bytes, list[bytes]]:
    try:
        envelope = json.loads(bundle)["dsseEnvelope"]
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"its payload is {str(envelope['payloadType'])[:80]!r}, must be {PAYLOAD_TYPE}")
        signatures = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"]]
        return base64.b64decode(envelope["payload"], validate=True), signatures
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is not a sigstore bundle with a DSSE envelope") from error


def _is_of(key: PublicKey, signature: bytes, encoded: bytes) -> bool:
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, encoded)
        else:
            key.verify(signature, encoded, ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _pre_authentication_encoding(payload: bytes) -> bytes:
    """PAE of the protocol: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _hint(key: PublicKey) -> str:
    return _text(sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest())


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
