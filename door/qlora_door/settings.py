"""The administrator's settings of the door."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from qlora_api.kubernetes_values import NamespaceName
from qlora_api.problems import explain_first
from qlora_api.schema import ApiModel
from qlora_api.spec.job import QLoRAJobSpec
from qlora_operator.decisions.manifests.network import Port

ENV_SETTINGS = "QLORA_DOOR_SETTINGS"
DEFAULT_AUDIENCE = "qlora-door"
ModelName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")]
_OF_THE_REQUEST = ("source", "mix", "eval", "sha256")


def _validate_template(spec: dict[str, Any]) -> dict[str, Any]:
    dataset = spec.get("dataset") or {}
    if taken := [name for name in _OF_THE_REQUEST if name in dataset]:
        raise ValueError(f"remove dataset.{taken[0]}: each request names its own files")
    try:
        QLoRAJobSpec.model_validate({**spec, "dataset": {**dataset, "source": "configMap://file/data.jsonl"}})
    except ValidationError as error:
        raise ValueError(explain_first(error, QLoRAJobSpec)) from None
    return spec


class ModelTemplate(ApiModel):
    """The jobs that a model's name stands for."""

    spec: Annotated[dict[str, Any], AfterValidator(_validate_template)] = Field(
        description="The spec of its QLoRAJobs, without the addresses of the data. Requests change hyperparameters."
    )


class BucketSettings(ApiModel):
    """The bucket that keeps large files, which jobs read at the same address."""

    address: str = Field(
        pattern=r"^(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*$",
        max_length=300,
        description="Bucket or container, and a folder if wanted: s3://BUCKET/FOLDER. Files are in a folder for each "
        "namespace below.",
    )
    endpoint: str | None = Field(
        None, pattern=r"^https?://", description="Address of the server, if it is not the cloud's own."
    )
    region: str | None = Field(None, description="Region of an S3 bucket.")


class FileSettings(ApiModel):
    """Where uploaded files are kept, and how large they may be."""

    bucket: BucketSettings | None = Field(
        None, description="For files above 1,000,000 bytes; without it, these are rejected. Others are ConfigMaps."
    )
    max_bytes: int = Field(512 * 2**20, ge=1, le=2**40, description="Largest file.")


class DoorSettings(ApiModel):
    """The administrator's settings of the door."""

    identity: Literal["impersonate", "token"] = Field(
        "impersonate",
        description="How the door acts for its users: impersonate checks a key of the audience and impersonates its "
        "user, with rights that Kubernetes 1.36 and later constrain; token sends the key itself to the API server, and "
        "needs no right.",
    )
    audience: str = Field(
        DEFAULT_AUDIENCE,
        min_length=1,
        max_length=253,
        description="With impersonate: audience of the tokens that are keys. The API server accepts none of them.",
    )
    namespaces: tuple[NamespaceName, ...] = Field((), description="Namespaces that the door serves; all if empty.")
    models: dict[ModelName, ModelTemplate] = Field(
        min_length=1, description="The models that can be fine-tuned, by the names that clients send."
    )
    files: FileSettings = Field(FileSettings(), description="Uploaded files.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Log level.")
    port: Port = Field(8000, description="Port of the API, without TLS: an Ingress or gateway adds it.")
    probe_port: Port = Field(8080, description="Port of /healthz and /readyz.")
    metrics_port: Port = Field(9090, description="Port of /metrics.")
