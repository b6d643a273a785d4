"""The addresses a job may name: hf://, pvc:// and configMap://, as patterns for the schema and as parsed values."""

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
_VOLUME = rf"pvc://{_CLAIM}(/{_PATH})?/?"
_CONFIG_MAP = rf"configMap://{_CLAIM}/[-_a-zA-Z0-9][-._a-zA-Z0-9]*"

MAX_SOURCE_LENGTH = 512


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face Hub, and a file or folder in it (empty: all of it)."""

    repository: str
    path: str = ""


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


Source = HubSource | VolumeSource | ConfigMapSource


def parse_source(uri: str) -> Source:
    """The parsed form of an address that the schema has admitted. Raises ValueError for any other."""
    scheme, separator, rest = uri.partition("://")
    if separator and re.fullmatch("|".join((_HUB_DATASET, _VOLUME, _CONFIG_MAP)), uri):
        head, _, tail = rest.rstrip("/").partition("/")
        if scheme == "pvc":
            return VolumeSource(head, tail)
        if scheme == "configMap":
            return ConfigMapSource(head, tail)
        name, _, path = tail.partition("/")
        return HubSource(f"{head}/{name}", path)
    raise ValueError(f"{uri!r} is not an address; allowed are hf://ORG/NAME, pvc://CLAIM/PATH and configMap://NAME/KEY")


def _address(pattern: str, allowed: str) -> tuple[AfterValidator, dict[str, object]]:
    message = f"must be {allowed}; a path has no '..' and no part that begins with a dot"

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"found {value[:80]!r}, {message}")
        return value

    return AfterValidator(check), rules(rule(f"self.matches('^({pattern})$')", message))


_model, _model_rules = _address(f"{_HUB_MODEL}|{_VOLUME}", "hf://ORG/NAME or pvc://CLAIM/PATH")
_dataset, _dataset_rules = _address(
    f"{_HUB_DATASET}|{_VOLUME}|{_CONFIG_MAP}", "hf://ORG/NAME, pvc://CLAIM/PATH or configMap://NAME/KEY"
)
# The root of a claim is nobody's own, so that a destination needs a folder.
_folder, _folder_rules = _address(rf"pvc://{_CLAIM}/{_PATH}/?", "pvc://CLAIM/PATH")

ModelAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_model_rules), _model]
DatasetAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_dataset_rules), _dataset]
FolderAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_folder_rules), _folder]
