"""How a model of the API is declared: camelCase names, frozen values, and rules that the API server enforces too."""

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

VALIDATIONS = "x-kubernetes-validations"


class ApiModel(BaseModel):
    """A part of the resource. Serialized by camelCase alias; immutable in Python."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")

    # mypy knows the fields of each model.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                # The sentences need the models, which need this class.
                from qlora_api.problems import explain_constructor

                raise explain_constructor(error, type(self)) from None

        # Documents are validated without this constructor.
        __init__.__pydantic_base_init__ = True

        def __setattr__(self, name: str, value: Any) -> None:
            copy = f"replace(…, {name}=…) of qlora_api.schema makes a copy with another {name}"
            raise AttributeError(f"a {type(self).__name__} is frozen: {copy}")

    def dump(self) -> dict[str, Any]:
        """Return the JSON object as the API server stores it: camelCase, no unset fields."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Decides(Enum):
    """Metadata of a spec's field: what else than the adapter it decides."""

    PREPARED_DATA = auto()
    """Also the sequences: data prepared with another value is prepared again."""
    NOT_THE_ADAPTER = auto()
    """A run continues with another value."""

    def settings(self, model: ApiModel) -> dict[str, Any]:
        """The JSON values of the model's fields with this mark, by their camelCase names."""
        fields = type(model).model_fields.items()
        names = {field.alias or name for name, field in fields if self in field.metadata}
        return {name: value for name, value in model.dump().items() if name in names}


class ObservedModel(ApiModel):
    """A part of the status or a record, which ignores fields of newer versions."""

    model_config = ConfigDict(extra="ignore")


Model = TypeVar("Model", bound=BaseModel)


def replace(model: Model, /, **changes: Any) -> Model:
    """Copy the model with these fields changed, and without validation.

    `crds/mypy_replace.py` gives mypy the names and types of the fields.
    """
    return model.model_copy(update=changes)


def replace_known(model: Model, /, **changes: Any) -> Model:
    """Copy the model as `replace` does, and keep the fields whose change is None."""
    return model.model_copy(update={name: value for name, value in changes.items() if value is not None})


def rule(expression: str, message: str) -> dict[str, str]:
    """One CEL rule of the schema. `message` has the allowed values and the remedy."""
    return {"rule": expression, "message": message}


def rules(*entries: dict[str, Any]) -> dict[str, Any]:
    """CEL rules as `json_schema_extra`, of a model or of a field."""
    return {VALIDATIONS: list(entries)}
