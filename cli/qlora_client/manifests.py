"""Makes the manifests of the client's jobs and sweeps, after the schema's checks."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qlora_api.problems import explain_first
from qlora_api.spec.job import API_VERSION, KIND, QLoRAJobDocument, QLoRAJobSpec
from qlora_api.sweep.grid import Grid
from qlora_api.sweep.spec import SWEEP_KIND, QLoRASweepDocument, cells

Object = dict[str, Any]
D = TypeVar("D", bound=BaseModel)


def job_manifest(name: str, spec: QLoRAJobSpec, labels: Mapping[str, str], annotations: Mapping[str, str]) -> Object:
    """The QLoRAJob of that name. Raises ValueError."""
    metadata = {"name": name, "labels": dict(labels), "annotations": dict(annotations)}
    body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": _fields(spec)}
    _validated(body, QLoRAJobDocument)
    return body


def sweep_manifest(name: str, template: QLoRAJobSpec, values: Mapping[str, Any], **settings: Any) -> Object:
    """The QLoRASweep of that name, with a cell for each combination of the values. Raises ValueError."""
    try:
        grid = Grid.model_validate(dict(values), by_alias=False, by_name=True).dump()
    except ValidationError as error:
        raise ValueError(explain_first(error, Grid, is_python=True)) from None
    spec = {"template": {"spec": _fields(template)}, "grid": grid, **settings}
    body = {"apiVersion": API_VERSION, "kind": SWEEP_KIND, "metadata": {"name": name}, "spec": spec}
    # Two cells with the same settings are valid for the schema, and not for the operator.
    cells(name, _validated(body, QLoRASweepDocument).spec, claim=name)
    return body


def _fields(spec: QLoRAJobSpec) -> Object:
    """The fields that the user has set; `_validated` reports wrong values of a copy."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True, warnings=False)


def _validated(body: Object, model: type[D]) -> D:
    """The document, read as the command line reads a manifest."""
    try:
        return model.model_validate_json(json.dumps(body), strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ValueError(explain_first(error, model)) from None
