"""Specs that the schema of QLoRAJob admits, as hypothesis draws them: also with names as long as it allows."""

import re
from typing import Any

from hypothesis import strategies as st
from pydantic import ValidationError

from qlora_api.crd import Schema, structural_schema
from qlora_api.schema import VALIDATIONS
from qlora_api.spec.job import QLoRAJobSpec
from tests.support.manifests import MINIMAL

_SCHEMA = structural_schema(QLoRAJobSpec, defaults=False)["properties"]
# What pods are built from, apart from what they read as a document.
_PARTS = (
    "model",
    "dataset",
    "lora",
    "output",
    "workspace",
    "resources",
    "scheduling",
    "retry",
    "activeDeadlineSeconds",
)
_TRIES = 3
"""Of a part, which may contradict itself or the other ones."""
_PATTERN_OF_RULE = re.compile(r"(?:self|self\.all\(key, key)\.matches\('(.*)'\)+")
_LIMITS = (64, 254)
"""Lengths just above those that Kubernetes allows for values of labels and for names."""


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec some of whose parts are not the defaults."""
    spec: dict[str, Any] = dict(MINIMAL["spec"])
    for part in _PARTS:
        found = (spec | {part: draw(_values(_SCHEMA[part]))} for _ in range(draw(st.integers(0, _TRIES))))
        spec = next(filter(_is_admitted, found), spec)
    return spec


def _is_admitted(spec: dict[str, Any]) -> bool:
    try:
        QLoRAJobSpec.model_validate(spec)
    except ValidationError:
        return False
    return True


def _values(schema: Schema) -> st.SearchStrategy[Any]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema["type"]:
        case "string":
            return _texts(_pattern(schema), schema.get("minLength", 0), schema.get("maxLength", 64))
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema["minimum"], schema["maximum"])
        case "number":
            return st.floats(schema.get("minimum", 0.0), schema.get("maximum", 1e3), exclude_min=True, width=32)
        case "array":
            fewest = schema.get("minItems", 0)
            return st.lists(_values(schema["items"]), min_size=fewest, max_size=max(fewest, 2))
    if "additionalProperties" in schema:
        return st.dictionaries(_texts(_pattern(schema), 1, 253), _values(schema["additionalProperties"]), max_size=2)
    return _objects(schema)


@st.composite
def _objects(draw: st.DrawFn, schema: Schema) -> dict[str, Any]:
    required = schema.get("required", ())
    optional = sorted(schema["properties"].keys() - set(required))
    chosen = draw(st.permutations(optional))[: draw(st.integers(0, 6))]
    return {name: draw(_values(schema["properties"][name])) for name in (*required, *chosen)}


def _pattern(schema: Schema) -> str | None:
    found = (_PATTERN_OF_RULE.fullmatch(entry["rule"]) for entry in schema.get(VALIDATIONS, ()))
    return schema.get("pattern") or next((match[1] for match in found if match), None)


@st.composite
def _texts(draw: st.DrawFn, pattern: str | None, shortest: int, longest: int) -> str:
    """A text of that pattern, longer by letters at any place that lets it match."""
    if pattern is None:
        return draw(st.text(min_size=shortest, max_size=min(longest, 40)))
    text: str = draw(st.from_regex(pattern, fullmatch=True).filter(lambda text: shortest <= len(text) <= longest))
    length = draw(st.sampled_from([0, *_LIMITS, longest]))
    more = "a" * (min(length, longest) - len(text))
    head, scheme, rest = text.rpartition("://")
    longer = (head + scheme + more + rest, text + more)
    return next((each for each in longer if re.fullmatch(pattern, each)), text)
