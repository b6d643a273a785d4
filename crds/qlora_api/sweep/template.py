"""The spec that all cells of a sweep share."""

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.schema import ApiModel, rule, rules
from qlora_api.spec.job import QLoRAJobSpec

_SUSPENDED = "suspend the sweep (spec.suspend) and not its template"
_CANCELED = "cancel ends one job: set it on a cell, or delete the sweep"
_CONTINUED = "continues takes up one run with the same settings, which cells change: remove it, or set lora.from"
_DELETED = "cells are deleted with their sweep: set ttlSecondsAfterFinished of the sweep and not of its template"

_MANAGED = "the operator creates the cells and manages them: set managedBy of the sweep and not of its template"


class SweepTemplate(ApiModel):
    """The spec that all cells share."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule("!self.spec.suspend", _SUSPENDED),
            rule("!has(self.spec.cancel)", _CANCELED),
            rule("!has(self.spec.continues)", _CONTINUED),
            rule("!has(self.spec.ttlSecondsAfterFinished)", _DELETED),
            rule("!has(self.spec.managedBy)", _MANAGED),
        )
    )

    spec: QLoRAJobSpec = Field(
        description="The spec of a QLoRAJob. workspace is the one claim that all cells use; a cell publishes to the "
        "folder of its name below output.destination."
    )

    @model_validator(mode="after")
    def _of_a_cell(self) -> Self:
        if self.spec.suspend:
            raise ValueError(_SUSPENDED)
        if self.spec.cancel is not None:
            raise ValueError(_CANCELED)
        if self.spec.continues is not None:
            raise ValueError(_CONTINUED)
        if self.spec.ttl_seconds_after_finished is not None:
            raise ValueError(_DELETED)
        if self.spec.managed_by is not None:
            raise ValueError(_MANAGED)
        return self
