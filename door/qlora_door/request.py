"""Reads the body of a request for a fine-tuning job."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from qlora_door.errors import ApiError, bad_request

MAX_REQUEST_BYTES = 2**20
_MAX_SEED = 2**31 - 1


def _chosen(value: object) -> object:
    # "auto" leaves the choice to the template and to prepare, as no value does.
    return None if value == "auto" else value


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hyperparameters(_Part):
    """The hyperparameters that a request sets; None leaves them to the template."""

    n_epochs: Annotated[StrictInt | None, Field(ge=1, le=1000), BeforeValidator(_chosen)] = None
    batch_size: Annotated[StrictInt | None, Field(ge=1, le=4096), BeforeValidator(_chosen)] = None
    learning_rate_multiplier: Annotated[
        StrictFloat | StrictInt | None, Field(gt=0, le=1000), BeforeValidator(_chosen)
    ] = None


class PairHyperparameters(Hyperparameters):
    """Those of direct preference optimization."""

    beta: Annotated[StrictFloat | StrictInt | None, Field(gt=0, le=100), BeforeValidator(_chosen)] = None


class _Supervised(_Part):
    hyperparameters: Hyperparameters | None = None


class _Pairs(_Part):
    hyperparameters: PairHyperparameters | None = None


class _Method(_Part):
    type: Literal["supervised", "dpo"]
    supervised: _Supervised | None = None
    dpo: _Pairs | None = None


class _WandbRun(_Part):
    project: Annotated[StrictStr, Field(min_length=1, max_length=128)]


class _Integration(_Part):
    type: Literal["wandb"]
    wandb: _WandbRun


Text = Annotated[StrictStr, Field(max_length=512)]


class JobRequest(_Part):
    """A request for a fine-tuning job, as OpenAI's API defines it."""

    model: StrictStr
    training_file: StrictStr
    validation_file: StrictStr | None = None
    method: _Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older place, for supervised training."""
    seed: Annotated[StrictInt | None, Field(ge=0, le=_MAX_SEED)] = None
    suffix: Annotated[StrictStr | None, Field(min_length=1, max_length=64)] = None
    metadata: Annotated[dict[Annotated[StrictStr, Field(max_length=64)], Text] | None, Field(max_length=16)] = None
    integrations: Annotated[tuple[_Integration, ...] | None, Field(max_length=1)] = None

    @property
    def method_name(self) -> Literal["supervised", "dpo"]:
        """The method of training."""
        return "supervised" if self.method is None else self.method.type

    @property
    def settings(self) -> PairHyperparameters:
        """The hyperparameters, of whichever place has them."""
        placed: Hyperparameters | None = self.hyperparameters
        if self.method is not None:
            part = self.method.supervised if self.method.type == "supervised" else self.method.dpo
            placed = (part.hyperparameters if part else None) or placed
        return PairHyperparameters(**(placed.model_dump() if placed else {}))

    @property
    def project(self) -> str | None:
        """The project in Weights & Biases, if the request names one."""
        return self.integrations[0].wandb.project if self.integrations else None


def parse_request(body: bytes) -> JobRequest:
    """Parse a request. Raises ApiError with the field and what it allows."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON") from None
    if not isinstance(content, dict):
        raise bad_request("the body must be a JSON object")
    try:
        request = JobRequest.model_validate(content)
    except ValidationError as error:
        raise _problem(error) from None
    _validate_places(request)
    return request


def _validate_places(request: JobRequest) -> None:
    method = request.method
    if method is None:
        return
    other = "dpo" if method.type == "supervised" else "supervised"
    if getattr(method, other) is not None:
        raise bad_request(f"method.{other} is set, and method.type is {method.type}: remove one", f"method.{other}")
    if request.hyperparameters is None:
        return
    part = getattr(method, method.type)
    if method.type == "dpo" or (part is not None and part.hyperparameters is not None):
        raise bad_request(
            f"hyperparameters are set in two places: keep method.{method.type}.hyperparameters", "hyperparameters"
        )


_UNSUPPORTED_METHOD = "must be supervised or dpo: others, such as reinforcement, are not supported"
_WANDB_PROJECT_ONLY = (
    "only wandb's project can be set: the administrator's profile names the server, the entity and the key"
)


def _problem(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)[0]
    # Unions add the types that they tried.
    path = ".".join(str(part) for part in found["loc"] if part not in ("float", "int"))
    if path == "method.type":
        return bad_request(f"{path}: found {_shown(found['input'])}, {_UNSUPPORTED_METHOD}", path)
    if path.startswith("integrations") and found["type"] == "extra_forbidden":
        return bad_request(f"{path}: {_WANDB_PROJECT_ONLY}", path)
    if found["type"] == "extra_forbidden":
        return bad_request(f"{path}: unknown, or not supported: remove it", path, "unknown_parameter")
    return bad_request(f"{path}: found {_shown(found['input'])}: {found['msg']}", path)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"
