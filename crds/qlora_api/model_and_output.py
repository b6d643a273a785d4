"""The part of a QLoRAJob's spec that says where models and adapters come from and where the adapter is published."""

from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.announce import AnnounceSpec
from qlora_api.gguf import GgufSpec
from qlora_api.profile import ObjectName
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import OBJECT_STORES, AdapterAddress, FolderAddress, ModelAddress, scheme_of
from qlora_api.tracking import TrackingSpec

Revision = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]


class SecretKeyRef(ApiModel):
    """One key of a Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: str = Field(
        default="token", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="Key in the Secret."
    )


class SecretRef(ApiModel):
    """A Secret in the job's namespace, with the credentials that the address needs."""

    name: ObjectName = Field(
        description="Name of the Secret. Its keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary "
        "credentials, AWS_SESSION_TOKEN for s3://; GOOGLE_SERVICE_ACCOUNT_KEY (JSON) for gs://; "
        "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN for az://; .dockerconfigjson for oci://; token for hf://."
    )


_NO_SECRET = (
    "secretRef is for s3://, gs://, az:// and oci:// models: for an hf:// model set tokenSecretRef, for pvc:// neither"  # noqa: S105
)
_NO_REVISION = "revision is for hf:// models: an oci:// address ends in a tag or digest, buckets and pvc:// have none"


class BaseModelSpec(ApiModel):
    """The base model, frozen during training."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.secretRef) || self.source.matches('^(s3|gs|az|oci)://')", _NO_SECRET),
            rule("!has(self.revision) || self.source.startsWith('hf://')", _NO_REVISION),
        )
    )

    source: ModelAddress = Field(
        description="Address of the base model, a folder with config.json, tokenizer and *.safetensors: hf://ORG/NAME "
        "(Hugging Face Hub), s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, oci://REGISTRY/REPOSITORY:TAG or "
        "@sha256:DIGEST (a ModelPack artifact with one layer per file), or pvc://CLAIM/PATH (a volume of this "
        "namespace, mounted read-only and not copied)."
    )
    revision: Revision | None = Field(
        default=None,
        description="Branch, tag or commit of an hf:// model; main if not set. The status records its commit.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        default=None, description="Token for gated or private repositories. Only the prepare step mounts it."
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Credentials for reading an s3://, gs://, az:// or oci:// model. Only the prepare step mounts "
        "them.",
    )

    @model_validator(mode="after")
    def _secret_of_its_scheme(self) -> Self:
        if self.secret_ref is not None and scheme_of(self.source) not in (*OBJECT_STORES, "oci"):
            raise ValueError(_NO_SECRET)
        return self

    @model_validator(mode="after")
    def _revision_of_a_repository(self) -> Self:
        if self.revision is not None and not self.source.startswith("hf://"):
            raise ValueError(_NO_REVISION)
        return self


_NOTHING_TO_READ = "secretRef is for s3://, gs://, az://, hf:// and oci:// adapters: remove it, or name another source"


class InitialAdapterSpec(ApiModel):
    """An earlier adapter with which training is initialized. It must be of the same base, rank, alpha and targets."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.secretRef) || !self.source.startsWith('pvc://')", _NOTHING_TO_READ),
        )
    )

    source: AdapterAddress = Field(
        description="Folder with adapter_model.safetensors and adapter_config.json, as output.destination or "
        "status.adapter.uri of another job names it: pvc://CLAIM/PATH, s3://BUCKET/PATH (or gs://, az://), "
        "hf://ORG/NAME (or @COMMIT) or oci://REGISTRY/REPOSITORY:TAG (or @sha256:DIGEST). Prepare copies it into the "
        "workspace."
    )
    sha256: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        max_length=64,
        description="SHA-256 of adapter_model.safetensors; any other file is rejected. Not compared if not set.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Credentials for reading the source. Only the prepare step mounts them. Without it, an hf:// "
        "adapter is read with model.tokenSecretRef.",
    )

    @model_validator(mode="after")
    def _secret_of_a_server(self) -> Self:
        if self.secret_ref is not None and self.source.startswith("pvc://"):
            raise ValueError(_NOTHING_TO_READ)
        return self


class MergedSpec(ApiModel):
    """The adapter merged into the dequantized base, in bfloat16: a plain model that any server loads."""

    destination: FolderAddress | None = Field(
        default=None,
        description="Folder for the merged model, as output.destination; `merged/` in the workspace if not set.",
    )


class PublishedBaseSpec(ApiModel):
    """The base model in 4-bit, with the very bytes that the adapter was trained on, for servers."""

    destination: FolderAddress = Field(
        description="Folder for the base, as output.destination. Jobs that were trained on the same base can name the "
        "same folder: it is written once."
    )


_NOTHING_TO_OPEN = "secretRef is for an s3://, gs://, az://, hf:// or oci:// destination: set one, or remove secretRef"
# The field of an address, in CEL whether it is not set, and whose folder it is.
_DESTINATIONS = {
    "destination": ("!has(self.destination)", "adapter"),
    "merged.destination": ("!has(self.merged) || !has(self.merged.destination)", "merged model"),
    "base.destination": ("!has(self.base)", "base"),
}


def _one_in_the_other(one: str, other: str) -> str:
    return f"{_DESTINATIONS[one][1]} and {_DESTINATIONS[other][1]} need separate folders: change {one} or {other}"


def _apart(one: str, other: str) -> dict[str, str]:
    """The rule that neither folder is inside of the other."""
    # An address may end in a slash, and pvc:// loses one of its own on both sides.
    first, second = (f"(self.{field} + '/').replace('//', '/')" for field in (one, other))
    return rule(
        f"{_DESTINATIONS[one][0]} || {_DESTINATIONS[other][0]} || "
        f"!({first}.startsWith({second}) || {second}.startsWith({first}))",
        _one_in_the_other(one, other),
    )


class OutputSpec(ApiModel):
    """Where the adapter is published."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.secretRef) || (has(self.destination) && !self.destination.startsWith('pvc://')) || "
                "(has(self.merged) && has(self.merged.destination) && !self.merged.destination.startsWith('pvc://')) "
                "|| (has(self.base) && !self.base.destination.startsWith('pvc://'))",
                _NOTHING_TO_OPEN,
            ),
            *(_apart(one, other) for one, other in combinations(_DESTINATIONS, 2)),
        )
    )

    destination: FolderAddress | None = Field(
        default=None,
        description="Folder for the adapter: pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, "
        "az://CONTAINER/PATH, hf://ORG/NAME (created as a private repository if there is none) or "
        "oci://REGISTRY/REPOSITORY:TAG; `adapter/` in the workspace if not set.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Credentials for writing to the destination. Publish mounts them, and prepare, which tries them.",
    )
    merged: MergedSpec | None = Field(
        default=None, description="Also publish the adapter merged into the dequantized base; not merged if not set."
    )
    base: PublishedBaseSpec | None = Field(
        default=None,
        description="Also publish the 4-bit base that the adapter was trained on; not published if not set.",
    )
    report: Literal["full", "withoutSamples", "none"] | None = Field(
        default=None,
        description="The page report.html beside the adapter: without the sample answers, which show rows of the data "
        "(withoutSamples, also if not set), with them (full), or not at all (none). The workspace has it in full.",
    )
    tracking: TrackingSpec | None = Field(
        default=None,
        description="How the history of the run is uploaded to the servers of the trackers in training.reportTo, if "
        "the profile names them.",
    )
    gguf: GgufSpec | None = Field(
        default=None, description="Also publish the adapter as a GGUF file, for llama.cpp and Ollama; none if not set."
    )
    announce: AnnounceSpec | None = Field(
        default=None, description="Announce the finished adapter to servers; not announced if not set."
    )

    @property
    def destinations(self) -> dict[str, str]:
        """The addresses that are set, by their fields: `merged.destination`."""
        found = {
            "destination": self.destination,
            "merged.destination": self.merged.destination if self.merged else None,
            "base.destination": self.base.destination if self.base else None,
        }
        return {field: address for field, address in found.items() if address}

    @model_validator(mode="after")
    def _secret_has_a_use(self) -> Self:
        if self.secret_ref and all(address.startswith("pvc://") for address in self.destinations.values()):
            raise ValueError(_NOTHING_TO_OPEN)
        return self

    @model_validator(mode="after")
    def _own_folders(self) -> Self:
        folders = {field: f"{address.rstrip('/')}/" for field, address in self.destinations.items()}
        for one, other in combinations(folders, 2):
            if folders[one].startswith(folders[other]) or folders[other].startswith(folders[one]):
                raise ValueError(_one_in_the_other(one, other))
        return self
