"""The part of a QLoRAJob's spec that says where the base model comes from and where the adapter goes."""

from typing import Annotated

from pydantic import Field

from qlora_api.profile import ObjectName
from qlora_api.schema import ApiModel
from qlora_api.sources import FolderAddress, ModelAddress

Revision = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]


class SecretKeyRef(ApiModel):
    """One key of a Secret in the job's namespace."""

    name: ObjectName = Field(description="Name of the Secret.")
    key: str = Field(
        "token", min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="Key in the Secret."
    )


class BaseModelSpec(ApiModel):
    """The base model, frozen during training."""

    source: ModelAddress = Field(
        description="Where the base model lies: hf://ORG/NAME (Hugging Face Hub) or pvc://CLAIM/PATH (a folder with "
        "config.json, tokenizer and *.safetensors on a volume of this namespace, mounted read-only and not copied)."
    )
    revision: Revision | None = Field(
        None,
        description="Branch, tag or commit of an hf:// model; main if not set. The commit it stands for is recorded.",
    )
    token_secret_ref: SecretKeyRef | None = Field(
        None, description="Read token for gated or private repositories. Only the prepare step sees it."
    )


class MergedSpec(ApiModel):
    """The adapter merged into the dequantized base, in bfloat16: a plain model that any server loads."""

    destination: FolderAddress | None = Field(
        None, description="Where the merged model goes, as output.destination; `merged/` in the workspace if not set."
    )


class OutputSpec(ApiModel):
    """Where the finished adapter goes."""

    destination: FolderAddress | None = Field(
        None, description="Folder for the adapter, pvc://CLAIM/PATH; `adapter/` in the workspace if not set."
    )
    merged: MergedSpec | None = Field(
        None, description="Also merge the adapter into the dequantized base and publish that; not if not set."
    )
