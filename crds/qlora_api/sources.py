"""The addresses a job may name, as patterns for the schema and as parsed values."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from qlora_api.schema import rule, rules

_CLAIM = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._=-]*"
_PATH = rf"{_SEGMENT}(/{_SEGMENT})*"
_REPOSITORY = rf"{_SEGMENT}/{_SEGMENT}"

_HUB_MODEL = rf"hf://{_REPOSITORY}"
_HUB_DATASET = rf"hf://{_REPOSITORY}(/{_PATH})?"
_HUB_COMMIT = rf"{_HUB_MODEL}@[0-9a-f]{{40}}"
_VOLUME = rf"pvc://{_CLAIM}(/{_PATH})?/?"
_CONFIG_MAP = rf"configMap://{_CLAIM}/[-_a-zA-Z0-9][-._a-zA-Z0-9]*"
# As each store names its buckets; Azure calls them containers.
_BUCKETS = {"s3": "[a-z0-9.-]", "gs": "[a-z0-9._-]", "az": "[a-z0-9-]"}
_BUCKET = "|".join(f"{scheme}://[a-z0-9]{letters}{{1,61}}[a-z0-9]" for scheme, letters in _BUCKETS.items())
_OBJECTS = rf"({_BUCKET})/{_PATH}/?"
OBJECT_STORES = tuple(_BUCKETS)
"""Schemes of the addresses of object stores: S3, Google Cloud Storage and Azure Blob Storage."""
# A registry's name has a dot or a port, unlike the first part of a repository's name (distribution/reference).
REGISTRY = r"([a-z0-9-]+([.][a-z0-9-]+)+(:[0-9]{1,5})?|[a-z0-9-]+:[0-9]{1,5})"
_ARTIFACT_NAME = r"[a-z0-9]+(([.]|_|__|-+)[a-z0-9]+)*"
_ARTIFACT = rf"oci://{REGISTRY}/{_ARTIFACT_NAME}(/{_ARTIFACT_NAME})*"
_TAG = r":[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_DIGEST = r"@sha256:[0-9a-f]{64}"
_TAGGED_OR_PINNED = rf"{_ARTIFACT}({_TAG}|({_TAG})?{_DIGEST})"

MAX_SOURCE_LENGTH = 512
TEMPLATE_NAMES = ("chatml", "gemma", "llama-3", "mistral", "zephyr")
"""The chat templates that the trainer brings."""


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face Hub, and a file or folder in it (empty: all of it)."""

    repository: str
    path: str = ""
    commit: str | None = None
    """None: the newest."""


@dataclass(frozen=True)
class VolumeSource:
    """A path (empty: the root) on a PersistentVolumeClaim of the job's namespace."""

    claim: str
    path: str = ""

    def __str__(self) -> str:
        return f"pvc://{self.claim}/{self.path}".rstrip("/")


@dataclass(frozen=True)
class ConfigMapSource:
    """One key of a ConfigMap of the job's namespace."""

    name: str
    key: str


@dataclass(frozen=True)
class ObjectStoreSource:
    """An object, or a prefix as a folder, in a bucket (Azure: a container) of the profile's object store."""

    bucket: str
    path: str
    scheme: str = "s3"
    """One of OBJECT_STORES."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"


@dataclass(frozen=True)
class RegistrySource:
    """An artifact of an OCI registry, by tag, digest or both."""

    registry: str
    """Host, with the port if it is not the usual one."""
    repository: str
    tag: str | None
    digest: str | None

    @property
    def reference(self) -> str:
        """The reference to request from the registry: the digest if it is known, else the tag."""
        return self.digest or self.tag or ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"oci://{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


Source = HubSource | VolumeSource | ConfigMapSource | ObjectStoreSource | RegistrySource


def scheme_of(uri: str) -> str:
    """The part of an address before its first colon."""
    return uri.partition("://")[0]


def parse_source(uri: str) -> Source:
    """The parsed form of an address that the schema has admitted. Raises ValueError for any other."""
    if not re.fullmatch("|".join((_HUB_DATASET, _HUB_COMMIT, _VOLUME, _CONFIG_MAP, _OBJECTS, _TAGGED_OR_PINNED)), uri):
        raise ValueError(
            f"{uri!r} is not an address; allowed are hf://ORG/NAME, pvc://CLAIM/PATH, s3://BUCKET/PATH, "
            "gs://BUCKET/PATH, az://CONTAINER/PATH, oci://REGISTRY/REPOSITORY:TAG and configMap://NAME/KEY"
        )
    scheme, _, rest = uri.partition("://")
    head, _, tail = rest.rstrip("/").partition("/")
    if scheme == "pvc":
        return VolumeSource(head, tail)
    if scheme == "configMap":
        return ConfigMapSource(head, tail)
    if scheme in OBJECT_STORES:
        return ObjectStoreSource(head, tail, scheme)
    if scheme == "oci":
        tagged, _, digest = tail.partition("@")
        repository, _, tag = tagged.partition(":")
        return RegistrySource(head, repository, tag or None, digest or None)
    name, _, commit = tail.partition("@")
    if commit:
        return HubSource(f"{head}/{name}", commit=commit)
    name, _, path = tail.partition("/")
    return HubSource(f"{head}/{name}", path)


_PATHS = "; a path has no '..' and no part that begins with a dot"


def _address(pattern: str, allowed: str, paths: str = _PATHS) -> tuple[AfterValidator, dict[str, object]]:
    message = f"must be {allowed}{paths}"

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"found {value[:80]!r}, {message}")
        return value

    return AfterValidator(check), rules(rule(f"self.matches('^({pattern})$')", message))


_model, _model_rules = _address(
    f"{_HUB_MODEL}|{_VOLUME}|{_OBJECTS}|{_TAGGED_OR_PINNED}",
    "hf://ORG/NAME, pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or "
    "oci://REGISTRY/REPOSITORY:TAG (or @sha256:DIGEST)",
)
_dataset, _dataset_rules = _address(
    f"{_HUB_DATASET}|{_VOLUME}|{_OBJECTS}|{_CONFIG_MAP}",
    "hf://ORG/NAME, pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or configMap://NAME/KEY",
)
# As destinations are written, and as status.adapter.uri names what was published there.
_adapter, _adapter_rules = _address(
    f"{_HUB_MODEL}|{_HUB_COMMIT}|{_VOLUME}|{_OBJECTS}|{_TAGGED_OR_PINNED}",
    "pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, hf://ORG/NAME (or @COMMIT) or "
    "oci://REGISTRY/REPOSITORY:TAG (or @sha256:DIGEST)",
)
# A claim's root is shared, so a destination needs a folder; a digest is not known before the upload.
_folder, _folder_rules = _address(
    rf"pvc://{_CLAIM}/{_PATH}/?|{_OBJECTS}|{_HUB_MODEL}|{_ARTIFACT}{_TAG}",
    "pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, hf://ORG/NAME or oci://REGISTRY/REPOSITORY:TAG",
)
_template, _template_rules = _address(
    f"{'|'.join(TEMPLATE_NAMES)}|{_CONFIG_MAP}", f"{', '.join(TEMPLATE_NAMES)} or configMap://NAME/KEY", paths=""
)

ModelAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_model_rules), _model]
DatasetAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_dataset_rules), _dataset]
AdapterAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_adapter_rules), _adapter]
FolderAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_folder_rules), _folder]
TemplateAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_template_rules), _template]
