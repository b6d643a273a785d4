"""Compares the schemas that an API server serves with the definitions of this release; pure."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from qlora_api.crd import definitions
from qlora_api.spec.job import GROUP, KIND, VERSION

OPENAPI_PATH = f"/openapi/v3/apis/{GROUP}/{VERSION}"
"""Where an API server has the document; everybody who is logged in may read it."""

Schema = Mapping[str, Any]


def missing_fields(document: Schema) -> list[str]:
    """Fields of this release's definitions that the OpenAPI document lacks, as `status.phase`; outermost only.

    Those of another kind than QLoRAJob begin with it: `QLoRASweep.status.phase`.
    """
    return [path for kind, definition in _own_definitions().items() for path in _missing_of(kind, definition, document)]


def unknown_fields(document: Schema) -> list[str]:
    """Return fields of a newer release's OpenAPI document that this one lacks."""
    found: list[str] = []
    for kind, definition in _own_definitions().items():
        served = _served_schema(document, kind)
        own = _own_schema(definition)
        prefix = "" if kind == KIND else f"{kind}."
        for part in ("spec", "status") if served is not None else ():
            found += _missing(_property(served or {}, part) or {}, own["properties"][part], f"{prefix}{part}")
    return sorted(found)


@cache
def _own_definitions() -> Mapping[str, Schema]:
    # To make them takes half a second.
    return definitions()


def _own_schema(definition: Schema) -> Schema:
    schema: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _missing_of(kind: str, definition: Schema, document: Schema) -> list[str]:
    served = _served_schema(document, kind)
    if served is None:
        return [kind]
    own = _own_schema(definition)["properties"]
    prefix = "" if kind == KIND else f"{kind}."
    parts = ("spec", "status")
    return sorted(path for part in parts for path in _missing(own[part], _property(served, part), f"{prefix}{part}"))


def _served_schema(document: Schema, wanted: str) -> Schema | None:
    schemas = (document.get("components") or {}).get("schemas") or {}
    for schema in schemas.values():
        kinds = schema.get("x-kubernetes-group-version-kind") or ()
        if any(kind.get("kind") == wanted for kind in kinds):
            return dict(schema)
    return None


def _property(schema: Schema, name: str) -> Schema | None:
    found: Schema | None = (schema.get("properties") or {}).get(name)
    return found


def _missing(own: Schema, served: Schema | None, path: str) -> Iterator[str]:
    if served is None:
        yield path
    elif not served.get("x-kubernetes-preserve-unknown-fields"):
        for name, part in (own.get("properties") or {}).items():
            yield from _missing(part, _property(served, name), f"{path}.{name}")
        for keyword in ("items", "additionalProperties"):
            if isinstance(own.get(keyword), Mapping):
                yield from _missing(own[keyword], served.get(keyword) or {}, f"{path}[]")
