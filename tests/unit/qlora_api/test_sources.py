"""Addresses: those of the schema parse, and those that could lead elsewhere are rejected."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_api.sources import (
    AdapterAddress,
    ConfigMapSource,
    DatasetAddress,
    FolderAddress,
    HubSource,
    ModelAddress,
    ObjectStoreSource,
    RegistrySource,
    Source,
    VolumeSource,
    parse_source,
)

DIGEST = f"sha256:{'0a' * 32}"


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("hf://meta-llama/Llama-3.1-8B", HubSource("meta-llama/Llama-3.1-8B")),
        ("hf://org/data/train/part-0.jsonl", HubSource("org/data", "train/part-0.jsonl")),
        ("pvc://models", VolumeSource("models")),
        ("pvc://models/", VolumeSource("models")),
        ("pvc://models/llama/7b/", VolumeSource("models", "llama/7b")),
        ("configMap://rows/train.jsonl", ConfigMapSource("rows", "train.jsonl")),
        ("s3://models/llama/7b/", ObjectStoreSource("models", "llama/7b")),
        ("gs://team_models/llama/7b/", ObjectStoreSource("team_models", "llama/7b", "gs")),
        ("az://models/llama/7b", ObjectStoreSource("models", "llama/7b", "az")),
        ("oci://ghcr.io/acme/models/tiny:v1", RegistrySource("ghcr.io", "acme/models/tiny", "v1", None)),
        ("oci://registry:5000/tiny:v1", RegistrySource("registry:5000", "tiny", "v1", None)),
        (f"hf://acme/tiny@{'0a' * 20}", HubSource("acme/tiny", commit="0a" * 20)),
        (f"oci://ghcr.io/acme/tiny@{DIGEST}", RegistrySource("ghcr.io", "acme/tiny", None, DIGEST)),
        (f"oci://ghcr.io/acme/tiny:v1@{DIGEST}", RegistrySource("ghcr.io", "acme/tiny", "v1", DIGEST)),
    ],
)
def test_an_address_parses(uri: str, source: Source) -> None:
    assert parse_source(uri) == source
    if not isinstance(source, ConfigMapSource):
        assert str(source) == uri.rstrip("/")


ESCAPES = [
    "",
    "models",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://169.254.169.254/latest",
    "s3://bucket",
    "s3://bucket/",
    "s3://BUCKET/key",
    "s3://bucket/../other/key",
    "s3://key:secret@bucket/path",
    "s3://bucket.example.org:9000/path",
    "https://bucket.s3.amazonaws.com/key",
    "gs://bucket",
    "gs://BUCKET/key",
    "gs://bucket/../other/key",
    "gs://bucket@evil.example/key",
    "az://container",
    "az://container/../other/key",
    "az://container@account/key",
    "az://account.blob.core.windows.net/container/key",
    "abfs://container/key",
    "oci://ghcr.io",
    "oci://ghcr.io/acme/tiny",
    "oci://acme/tiny:v1",
    "oci://user:password@ghcr.io/acme/tiny:v1",
    "oci://ghcr.io/acme/../tiny:v1",
    "oci://ghcr.io/acme/tiny:v1?x=y",
    "oci://ghcr.io/acme/tiny@sha256:abc",
    "pvc://",
    "pvc://claim/../other",
    "pvc://claim/a/../../b",
    "pvc://claim//a",
    "pvc://claim/.hidden",
    "pvc://CLAIM/path",
    "pvc://claim/a b",
    "pvc://claim/a\n",
    "pvc://claim/$(id)",
    "hf://only-one",
    "hf://org/../name",
    "hf://org/name@main",
    "hf://user:password@host/name",
    "configMap://name",
    "configMap://name/..",
    "configMap://name/a/b",
]


@pytest.mark.parametrize("uri", ESCAPES)
def test_other_addresses_are_rejected_with_the_allowed_forms(uri: str) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        parse_source(uri)
    for address in (ModelAddress, DatasetAddress, AdapterAddress, FolderAddress):
        with pytest.raises(ValidationError, match="must be"):
            TypeAdapter(address).validate_python(uri)


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        (ModelAddress, "configMap://a/b"),
        (ModelAddress, "hf://a/b/c"),
        (ModelAddress, f"hf://a/b@{'0a' * 20}"),
        (FolderAddress, f"hf://a/b@{'0a' * 20}"),
        (AdapterAddress, "configMap://a/b"),
        (AdapterAddress, "hf://a/b/c"),
        (DatasetAddress, "oci://ghcr.io/acme/rows:v1"),
        (FolderAddress, "hf://a/b/c"),
        (FolderAddress, "pvc://claim/"),
        (FolderAddress, f"oci://ghcr.io/acme/tiny@{DIGEST}"),
        (FolderAddress, f"oci://ghcr.io/acme/tiny:v1@{DIGEST}"),
    ],
)
def test_a_scheme_that_a_field_cannot_use_is_rejected(address: Any, uri: str) -> None:
    with pytest.raises(ValidationError, match="must be"):
        TypeAdapter(address).validate_python(uri)
