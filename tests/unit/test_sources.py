"""Addresses: what the schema admits parses, and what could lead elsewhere is refused."""

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_api.sources import (
    ConfigMapSource,
    DatasetAddress,
    FolderAddress,
    HubSource,
    ModelAddress,
    Source,
    VolumeSource,
    parse_source,
)


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("hf://meta-llama/Llama-3.1-8B", HubSource("meta-llama/Llama-3.1-8B")),
        ("hf://org/data/train/part-0.jsonl", HubSource("org/data", "train/part-0.jsonl")),
        ("pvc://models", VolumeSource("models")),
        ("pvc://models/", VolumeSource("models")),
        ("pvc://models/llama/7b/", VolumeSource("models", "llama/7b")),
        ("configMap://rows/train.jsonl", ConfigMapSource("rows", "train.jsonl")),
    ],
)
def test_an_address_parses(uri: str, source: Source) -> None:
    assert parse_source(uri) == source


ESCAPES = [
    "",
    "models",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://169.254.169.254/latest",
    "s3://bucket/key",
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
def test_anything_else_is_refused_with_what_is_allowed(uri: str) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        parse_source(uri)
    for address in (ModelAddress, DatasetAddress, FolderAddress):
        with pytest.raises(ValidationError, match="must be"):
            TypeAdapter(address).validate_python(uri)


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        (ModelAddress, "configMap://a/b"),
        (ModelAddress, "hf://a/b/c"),
        (FolderAddress, "hf://a/b"),
        (FolderAddress, "pvc://claim/"),
    ],
)
def test_a_scheme_that_a_field_cannot_use_is_refused(address: object, uri: str) -> None:
    with pytest.raises(ValidationError, match="must be"):
        TypeAdapter(address).validate_python(uri)
