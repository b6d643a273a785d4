"""The namespaces whose jobs may use a profile."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from qlora_api.kubernetes_values import NamespaceName, NodeSelector
from qlora_api.schema import ApiModel, rule, rules


class NamespaceSelector(ApiModel):
    """Selects namespaces by their labels."""

    match_labels: NodeSelector = Field(min_length=1, description="Labels that a namespace must have, all of them.")


class AllowedNamespaces(ApiModel):
    """The namespaces whose jobs may use the profile: those named, and those selected."""

    model_config = ConfigDict(
        json_schema_extra=rules(rule("has(self.names) || has(self.selector)", "set names, selector, or both"))
    )

    names: Annotated[tuple[NamespaceName, ...], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="Names of namespaces."
    )
    selector: NamespaceSelector | None = Field(
        None, description="Also each namespace with these labels. A changed label counts within half a minute."
    )

    @model_validator(mode="after")
    def _names_or_selector(self) -> Self:
        if self.names is None and self.selector is None:
            raise ValueError("set names, selector, or both")
        return self
