"""The part of a QLoRAJob's spec about the base model and an earlier adapter."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import ObjectName
from qlora_api.schema import ApiModel, rule, rules
from qlora_api.sources import (
    OBJECT_STORES,
    SCHEMES,
    WITH_SECRET,
    AdapterAddress,
    ModelAddress,
    examples,
    prefixes,
    scheme_of,
    series,
)

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
        description="Name of the Secret. Its keys: "
        + "; ".join(f"{SCHEMES[name].keys} for {name}://" for name in WITH_SECRET)
        + "."
    )


_OPENED_BY_SECRET = tuple(name for name in WITH_SECRET if name != "hf")
_NO_SECRET = (
    f"secretRef is for {prefixes(_OPENED_BY_SECRET, 'and')} models: for an hf:// model set tokenSecretRef, for pvc:// "
    "neither"
)
_NO_REVISION = "revision is for hf:// models: an oci:// address ends in a tag or digest, buckets and pvc:// have none"


class BaseModelSpec(ApiModel):
    """The base model, frozen during training."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(f"!has(self.secretRef) || self.source.matches('^({'|'.join(_OPENED_BY_SECRET)})://')", _NO_SECRET),
            rule("!has(self.revision) || self.source.startsWith('hf://')", _NO_REVISION),
        )
    )

    source: ModelAddress = Field(
        description="Address of the base model, a folder with config.json, tokenizer and *.safetensors: hf://ORG/NAME "
        f"(Hugging Face Hub), {', '.join(examples(*OBJECT_STORES))}, oci://REGISTRY/REPOSITORY:TAG or "
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
        description=f"Credentials for reading an {prefixes(_OPENED_BY_SECRET)} model. Only the prepare step mounts "
        "them.",
    )

    @model_validator(mode="after")
    def _secret_of_its_scheme(self) -> Self:
        if self.secret_ref is not None and scheme_of(self.source) not in _OPENED_BY_SECRET:
            raise ValueError(_NO_SECRET)
        return self

    @model_validator(mode="after")
    def _revision_of_a_repository(self) -> Self:
        if self.revision is not None and not self.source.startswith("hf://"):
            raise ValueError(_NO_REVISION)
        return self


_NOTHING_TO_READ = f"secretRef is for {prefixes(WITH_SECRET, 'and')} adapters: remove it, or name another source"


class InitialAdapterSpec(ApiModel):
    """An earlier adapter as the start, of the same base, rank, alpha and targets."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!has(self.secretRef) || !self.source.startsWith('pvc://')", _NOTHING_TO_READ),
        )
    )

    source: AdapterAddress = Field(
        description="Folder with adapter_model.safetensors and adapter_config.json, as output.destination or "
        f"status.adapter.uri of another job names it: {series(examples(*SCHEMES))}, an hf:// address with @COMMIT and "
        "an oci:// address with @sha256:DIGEST too. Prepare copies it into the workspace."
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
