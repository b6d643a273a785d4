"""The addresses a job may name, as patterns for the schema and as parsed values: `SCHEMES` declares each kind."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from qlora_api.schema import rule, rules

# The name of most objects. Short, as the API server bounds the cost of the rules that have it, and without a backslash,
# which would begin an escape sequence in them.
SUBDOMAIN = "[a-z0-9]+((-+|[.])[a-z0-9]+)*"
_SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9._=-]*"
_PATH = rf"{_SEGMENT}(/{_SEGMENT})*"
_HUB_MODEL = rf"hf://{_SEGMENT}/{_SEGMENT}"
_HUB_DATASET = rf"{_HUB_MODEL}(/{_PATH})?"
_HUB_COMMIT = rf"{_HUB_MODEL}@[0-9a-f]{{40}}"
_VOLUME = rf"pvc://{SUBDOMAIN}(/{_PATH})?/?"
_CONFIG_MAP = rf"configMap://{SUBDOMAIN}/[-_a-zA-Z0-9][-._a-zA-Z0-9]*"
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
    """A repository of the Hugging Face Hub, and a path in it (empty: all of it)."""

    scheme: ClassVar[str] = "hf"
    repository: str
    path: str = ""
    commit: str | None = None
    """None: the newest."""

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        return f"hf://{self.repository}{path}" + (f"@{self.commit}" if self.commit else "")


@dataclass(frozen=True)
class VolumeSource:
    """A path (empty: the root) on a PersistentVolumeClaim of the job's namespace."""

    scheme: ClassVar[str] = "pvc"
    claim: str
    path: str = ""

    def __str__(self) -> str:
        return f"pvc://{self.claim}/{self.path}".rstrip("/")


@dataclass(frozen=True)
class ConfigMapSource:
    """One key of a ConfigMap of the job's namespace."""

    scheme: ClassVar[str] = "configMap"
    name: str
    key: str


@dataclass(frozen=True)
class ObjectStoreSource:
    """An object, or a prefix as a folder, in a bucket or container of the store."""

    bucket: str
    path: str
    scheme: str = "s3"
    """Its key in SCHEMES."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"


@dataclass(frozen=True)
class RegistrySource:
    """An artifact of an OCI registry, by tag, digest or both."""

    scheme: ClassVar[str] = "oci"
    registry: str
    """Host, with the port if it is not the usual one."""
    repository: str
    tag: str | None
    digest: str | None

    @property
    def reference(self) -> str:
        """The reference to request from the registry: the known digest, else the tag."""
        return self.digest or self.tag or ""

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"oci://{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


Source = HubSource | VolumeSource | ConfigMapSource | ObjectStoreSource | RegistrySource


@dataclass(frozen=True)
class ProfileSetting:
    """A profile's field that a store's clients read from an environment variable."""

    variable: str
    path: tuple[str, ...]
    """Keys of the profile: objectStore, endpoint."""
    names_server: bool = True
    """Whether it decides the server that receives the credentials."""
    default: str = ""
    """The value that clients use without it. A user's credentials belong to that server."""


@dataclass(frozen=True)
class Scheme:
    """A kind of address of destinations: its form, credentials and settings.

    The schema, the operator's volumes, the redaction of records and the downloads by users derive from it.
    """

    name: str
    example: str
    """The address of a destination, for people."""
    destination: str
    """Pattern of a destination's address; of an object store, that of its bucket."""
    parse: Callable[[str, str], Source]
    """Parses the address's first part and the rest of its path."""
    secret_keys: tuple[str, ...] = ()
    """Keys of the Secret that must exist."""
    optional_secret_keys: tuple[str, ...] = ()
    only_the_store_checks: str = ""
    """The part of a key's value that no other check covers, for people, if that is not all of it."""
    described_keys: str = ""
    """All keys, for people, if that is more than a choice of them."""
    is_object_store: bool = False
    redacted: tuple[str, ...] = ()
    """Patterns of its credentials, which no record shows."""
    settings: tuple[ProfileSetting, ...] = ()
    own_credentials: tuple[str, ...] = ()
    """Environment variables that hold credentials of a user; any of them is enough."""
    login: str = ""
    """What a user does to get access. `{server}` stands for the address's first part."""

    @property
    def credential(self) -> str:
        """Its credentials as a store checks them, for people."""
        keys = " and ".join(self.secret_keys) or " or ".join(self.optional_secret_keys)
        return self.only_the_store_checks or f"the value of {keys}"

    @property
    def keys(self) -> str:
        """The keys of its Secret, for people; empty without any."""
        return self.described_keys or " or ".join((*self.secret_keys, *self.optional_secret_keys))


def _hub_source(owner: str, rest: str) -> Source:
    name, _, commit = rest.partition("@")
    if commit:
        return HubSource(f"{owner}/{name}", commit=commit)
    name, _, path = rest.partition("/")
    return HubSource(f"{owner}/{name}", path)


def _registry_source(registry: str, rest: str) -> Source:
    tagged, _, digest = rest.partition("@")
    repository, _, tag = tagged.partition(":")
    return RegistrySource(registry, repository, tag or None, digest or None)


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        # A claim's root is shared, so a destination needs a folder.
        Scheme("pvc", "pvc://CLAIM/PATH", rf"pvc://{SUBDOMAIN}/{_PATH}/?", VolumeSource),
        # The stores have different rules for names of buckets, which Azure calls containers.
        Scheme(
            "s3",
            "s3://BUCKET/PATH",
            "s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]",
            ObjectStoreSource,
            is_object_store=True,
            secret_keys=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
            optional_secret_keys=("AWS_SESSION_TOKEN",),
            described_keys="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary credentials, AWS_SESSION_TOKEN",
            # Parameters that sign an address, of S3 and of CloudFront.
            redacted=(
                r"(?<=[?&])(?i:x-amz-(?:credential|signature|security-token))=[^\s&\"']+",
                r"(?<=[?&])(?i:signature|policy|key-pair-id)=[^\s&\"']+",
            ),
            settings=(
                ProfileSetting("AWS_ENDPOINT_URL", ("objectStore", "endpoint")),
                ProfileSetting("AWS_REGION", ("objectStore", "region"), names_server=False),
            ),
            own_credentials=("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"),
            login="set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if there is one, AWS_SESSION_TOKEN",
        ),
        Scheme(
            "gs",
            "gs://BUCKET/PATH",
            "gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]",
            partial(ObjectStoreSource, scheme="gs"),
            is_object_store=True,
            secret_keys=("GOOGLE_SERVICE_ACCOUNT_KEY",),
            only_the_store_checks="private_key in GOOGLE_SERVICE_ACCOUNT_KEY",
            described_keys="GOOGLE_SERVICE_ACCOUNT_KEY (JSON)",
            redacted=(r"(?<=[?&])(?i:x-goog-(?:credential|signature|security-token))=[^\s&\"']+",),
            settings=(ProfileSetting("GOOGLE_BASE_URL", ("googleStorage", "endpoint")),),
            own_credentials=(
                "GOOGLE_APPLICATION_CREDENTIALS",
                "GOOGLE_SERVICE_ACCOUNT",
                "GOOGLE_SERVICE_ACCOUNT_KEY",
                "GOOGLE_SERVICE_ACCOUNT_PATH",
            ),
            login="set GOOGLE_APPLICATION_CREDENTIALS to the file of your credentials",
        ),
        Scheme(
            "az",
            "az://CONTAINER/PATH",
            "az://[a-z0-9][a-z0-9-]{1,61}[a-z0-9]",
            partial(ObjectStoreSource, scheme="az"),
            is_object_store=True,
            # One of them: without either, the step fails and is tried again.
            optional_secret_keys=("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
            redacted=(r"(?i:accountkey)=[^;\s\"']+", r"(?<=[?&])(?i:sig)=[^\s&\"']+"),
            settings=(
                ProfileSetting("AZURE_STORAGE_ACCOUNT_NAME", ("azureStorage", "account")),
                ProfileSetting("AZURE_STORAGE_ENDPOINT", ("azureStorage", "endpoint")),
            ),
            own_credentials=("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
            login="set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
        ),
        Scheme(
            "hf",
            "hf://ORG/NAME",
            _HUB_MODEL,
            _hub_source,
            secret_keys=("token",),
            redacted=("hf_[A-Za-z0-9]{8,}",),
            settings=(ProfileSetting("HF_ENDPOINT", ("hubEndpoint",), default="https://huggingface.co"),),
            own_credentials=("HF_TOKEN",),
            login="set HF_TOKEN to a token that may read it",
        ),
        # A digest is not known before the upload.
        Scheme(
            "oci",
            "oci://REGISTRY/REPOSITORY:TAG",
            f"{_ARTIFACT}{_TAG}",
            _registry_source,
            secret_keys=(".dockerconfigjson",),
            login="run `docker login {server}`",
        ),
    )
}
OBJECT_STORES = tuple(scheme.name for scheme in SCHEMES.values() if scheme.is_object_store)
"""Schemes of the addresses of object stores: S3, Google Cloud Storage and Azure Blob Storage."""
WITH_SECRET = tuple(scheme.name for scheme in SCHEMES.values() if scheme.keys)
"""Schemes of the addresses that a Secret opens."""
# The schema's rule is cheaper to evaluate with one pattern for all buckets.
_OBJECTS = rf"({'|'.join(SCHEMES[name].destination for name in OBJECT_STORES)})/{_PATH}/?"
_DESTINATION = "|".join(
    dict.fromkeys(_OBJECTS if each.is_object_store else each.destination for each in SCHEMES.values())
)


def scheme_of(uri: str) -> str:
    """The part of an address before its first colon."""
    return uri.partition("://")[0]


def series(words: Iterable[str], conjunction: str = "or") -> str:
    """The words as a list in a sentence: a, b or c."""
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def prefixes(schemes: Iterable[str], conjunction: str = "or") -> str:
    """The schemes as a list in a sentence: s3://, gs:// or az://."""
    return series((f"{scheme}://" for scheme in schemes), conjunction)


def examples(*schemes: str) -> list[str]:
    """Examples of addresses of these schemes."""
    return [SCHEMES[scheme].example for scheme in schemes]


def parse_source(uri: str) -> Source:
    """Parse an address that the schema has admitted. Raises ValueError for any other."""
    known = (_HUB_DATASET, _HUB_COMMIT, _VOLUME, _CONFIG_MAP, _TAGGED_OR_PINNED, _DESTINATION)
    if not re.fullmatch("|".join(known), uri):
        allowed = series([*examples(*SCHEMES), _KEY_OF_CONFIG_MAP], "and")
        raise ValueError(f"{uri!r} is not an address; allowed are {allowed}")
    scheme, _, rest = uri.partition("://")
    head, _, tail = rest.rstrip("/").partition("/")
    return ConfigMapSource(head, tail) if scheme == "configMap" else SCHEMES[scheme].parse(head, tail)


_PATHS = "; a path has no '..' and no part that begins with a dot"


def _address(pattern: str, allowed: str, paths: str = _PATHS) -> tuple[AfterValidator, dict[str, object]]:
    message = f"must be {allowed}{paths}"

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"found {value[:80]!r}, {message}")
        return value

    return AfterValidator(check), rules(rule(f"self.matches('^({pattern})$')", message))


_KEY_OF_CONFIG_MAP = "configMap://NAME/KEY"
_BUCKETS = examples(*OBJECT_STORES)
_model, _model_rules = _address(
    f"{_HUB_MODEL}|{_VOLUME}|{_OBJECTS}|{_TAGGED_OR_PINNED}",
    f"{series([*examples('hf', 'pvc'), *_BUCKETS, *examples('oci')])} (or @sha256:DIGEST)",
)
_dataset, _dataset_rules = _address(
    f"{_HUB_DATASET}|{_VOLUME}|{_OBJECTS}|{_CONFIG_MAP}",
    series([*examples("hf", "pvc"), *_BUCKETS, _KEY_OF_CONFIG_MAP]),
)
# As destinations are written, and as status.adapter.uri names what was published there.
_adapter, _adapter_rules = _address(
    f"{_HUB_MODEL}|{_HUB_COMMIT}|{_VOLUME}|{_OBJECTS}|{_TAGGED_OR_PINNED}",
    f"{series([*examples('pvc'), *_BUCKETS, 'hf://ORG/NAME (or @COMMIT)', *examples('oci')])} (or @sha256:DIGEST)",
)
_folder, _folder_rules = _address(_DESTINATION, series(examples(*SCHEMES)))
_template, _template_rules = _address(
    f"{'|'.join(TEMPLATE_NAMES)}|{_CONFIG_MAP}", series([*TEMPLATE_NAMES, _KEY_OF_CONFIG_MAP]), paths=""
)

ModelAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_model_rules), _model]
DatasetAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_dataset_rules), _dataset]
AdapterAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_adapter_rules), _adapter]
FolderAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_folder_rules), _folder]
TemplateAddress = Annotated[str, Field(max_length=MAX_SOURCE_LENGTH, json_schema_extra=_template_rules), _template]
