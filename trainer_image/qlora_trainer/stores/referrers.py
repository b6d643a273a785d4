"""Attaches a document to an artifact of a registry, and finds those that are attached: OCI 1.1's referrers.

Sources: https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md#listing-referrers, and for cosign's
place, https://github.com/sigstore/cosign/blob/main/specs/BUNDLE_SPEC.md
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.stores.registry import INDEX_TYPE, MANIFEST_TYPE, Artifact, Blob, Index, Layer, Registry, digest_of

_EMPTY = b"{}"
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_MAX_DOCUMENT_BYTES = 2**22
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def attach(
    registry: Registry, artifact: Artifact, document: bytes, media_type: str, annotations: Mapping[str, str]
) -> None:
    """Attach the document to the artifact, once for repeated calls.

    Raises StepFailure.
    """
    for content in (_EMPTY, document):
        registry.upload(Blob(digest_of(content), len(content)), content)
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": media_type,
            "config": {"mediaType": _EMPTY_TYPE, **_descriptor(_EMPTY)},
            "layers": [{"mediaType": media_type, **_descriptor(document)}],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": artifact.digest, "size": artifact.size},
            "annotations": dict(annotations),
        }
    )
    if registry.put_referrer(manifest):
        return
    # A registry without the API lists under a tag what clients have attached.
    described = {"mediaType": MANIFEST_TYPE, "artifactType": media_type, "annotations": dict(annotations)}
    entry = {**described, **_descriptor(manifest)}
    tag = _tag(artifact.digest)
    listed = _entries(registry.index(tag))
    if entry["digest"] not in [one.get("digest") for one in listed]:
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*listed, entry]}
        registry.tag(_json(index), tag, media_type=INDEX_TYPE)


@dataclass(frozen=True)
class Attached:
    """The documents of a type that are attached to an artifact."""

    documents: tuple[bytes, ...]
    looked_at: int
    """Of what is attached, in the registry's order."""
    is_all: bool
    """Whether no more is attached: whoever may push can attach more than is looked at."""


def find_attached(registry: Registry, digest: str, media_type: str) -> Attached:
    """The documents of this type that are attached to the artifact with the digest. Raises StepFailure.

    Other attachments are skipped: any client with push access can attach anything.
    """
    referrers = registry.referrers(digest, media_type)
    pages = [registry.index(_tag(digest))] if referrers is None else referrers.pages
    listed = [entry for page in pages for entry in _entries(page)]
    documents = []
    for entry in listed:
        if entry.get("artifactType") != media_type or entry.get("mediaType") != MANIFEST_TYPE:
            continue
        if (blob := _document(registry, entry.get("digest"))) is not None and registry.has_blob(blob):
            documents.append(registry.read(blob))
    return Attached(tuple(documents), len(listed), is_all=referrers is None or referrers.is_all)


def _document(registry: Registry, digest: object) -> Blob | None:
    """The first layer of an attachment.

    None if that is no manifest, or its layer none that is read into memory.
    """
    found = registry.referrer(digest) if isinstance(digest, str) and _DIGEST.fullmatch(digest) else None
    layer: Layer = found["layers"][0] if found is not None and found["layers"] else {}
    name, size = layer.get("digest"), layer.get("size")
    if not (isinstance(name, str) and _DIGEST.fullmatch(name) and type(size) is int):
        return None
    return Blob(name, size) if 0 < size <= _MAX_DOCUMENT_BYTES else None


def _entries(index: Index | None) -> list[JsonObject]:
    listed = None if index is None else index.get("manifests")
    return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []


def _tag(digest: str) -> str:
    return digest.replace(":", "-")


def _descriptor(content: bytes) -> JsonObject:
    return {"digest": digest_of(content), "size": len(content)}


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
