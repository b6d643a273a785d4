"""Describes a problem of a field in one sentence: the value, the allowed ones, the remedy.

A field is one of a manifest, or one of a model that a program constructs.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from qlora_api.addresses import advice_on_address
from qlora_api.kubernetes_values import (
    DNS_LABEL,
    DNS_LABEL_WORDS,
    DNS_SUBDOMAIN,
    DOMAIN_PREFIXED_PATH,
    GPU_MEMORY,
    LABEL_KEY,
    LABEL_VALUE,
    QUANTITY,
)
from qlora_api.sweep.grid import Grid, Overrides

Location = tuple[int | str, ...]

_SHARE = "; it is a share: 0.1 is 10 percent"
# Remedies for common mistakes, by field, or by field and value as JSON.
_ADVICE: Mapping[tuple[str, ...], str] = {
    ("chatTemplate",): ", such as chatml or configMap://NAME/KEY",
    ("continues",): "; it is the name of the job whose checkpoint is taken up",
    ("fraction",): _SHARE,
    ("gpuMemory",): "; write the unit, for example 24Gi",
    ("minImprovement",): _SHARE,
    ("minScore",): _SHARE,
    ("objective", '"kto"'): "; for these, make pairs of a good and a bad answer to the same prompt (format preference)",
    ("schema",): "; write `schema: |`, and the JSON in the lines below",
}
# YAML's names of types, by pydantic's name of the problem.
_TYPES: Mapping[str, str] = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list: in [ ], or with '- ' before each entry",
}
# Of the addresses of models, data and adapters.
_AN_ADDRESS = "pvc://CLAIM/PATH"
# Fields whose number needs a unit.
_WITH_UNIT = ("gpuMemory", "memory", "size")
_OTHER_NAMES: Mapping[str, str] = {"profile": "profileName", "queue": "queueName"}
"""Names by which users know fields."""
# A field that more objects have, such as source, is ambiguous.
_MAX_PLACES = 3
_NUMBERS: Mapping[str, re.Pattern[str]] = {
    "float_type": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"),
    "int_type": re.compile(r"[-+]?[0-9]+"),
}
"""Notation of a number type, by pydantic's name of the problem."""
_NAME_CHARACTERS = "must be letters, digits, '-', '_' and '.'"
WORDS_OF_PATTERN: Mapping[str, str] = {
    DOMAIN_PREFIXED_PATH: "must be a domain, '/' and a path, for example kueue.x-k8s.io/multikueue",
    GPU_MEMORY: "must be whole GiB",
    r"\S": "must not be blank",
    r"^[0-9a-f]{64}$": "must be 64 lower-case hexadecimal digits",
    r"^[A-Za-z0-9][A-Za-z0-9._/-]*$": "must be a branch, tag or commit: letters, digits, '.', '_', '/' and '-', with a "
    "letter or digit first",
    r"^[A-Za-z0-9][-A-Za-z0-9_.]*$": f"{_NAME_CHARACTERS}, with a letter or digit first",
    r"^[A-Za-z0-9][A-Za-z0-9_@.-]*(,[A-Za-z0-9_.-]+)?$": "must be a metric of the task, or METRIC,FILTER",
    r"^[A-Za-z0-9_.-]+$": _NAME_CHARACTERS,
    r"^[-._a-zA-Z0-9]+$": _NAME_CHARACTERS,
    DNS_LABEL: DNS_LABEL_WORDS,
    DNS_SUBDOMAIN: "must be lower-case letters, digits, hyphens and dots, with a letter or digit at both ends of each "
    "part between dots",
    LABEL_KEY: f"{_NAME_CHARACTERS}, 63 at most, with a letter or digit at both ends; a domain and '/' may be before",
    LABEL_VALUE: f"{_NAME_CHARACTERS}, with a letter or digit at both ends, or empty",
    QUANTITY: "must be a number above 0, as in '2', '500m' or '24Gi'; units are m, k, M, G, T, P, Ki, Mi, Gi, Ti and "
    "Pi",
}
"""A description of each regular expression of the manifests' models."""


def follows_from_another(problem: ErrorDetails) -> bool:
    """Whether the list only seems too short, without its reported entries."""
    value = problem["input"]
    return problem["type"] == "too_short" and isinstance(value, Sized) and len(value) >= problem["ctx"]["min_length"]


def explain_constructor(error: ValidationError, model: type[BaseModel]) -> ValidationError:
    """Return the error of the model's constructor with a sentence for each problem."""
    problems = [problem for problem in error.errors(include_url=False) if not follows_from_another(problem)]
    lines: list[InitErrorDetails] = [
        {
            "type": PydanticCustomError(
                cast("Any", problem["type"]), cast("Any", explain(problem, model, is_python=True))
            ),
            "loc": problem["loc"],
            "input": problem["input"],
        }
        for problem in problems
    ]
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


def explain_first(error: ValidationError, model: type[BaseModel], *, is_python: bool = False) -> str:
    """Return the sentence for the first problem, after the path of its field."""
    first = error.errors(include_url=False)[0]
    field, sentence = ".".join(map(str, first["loc"])), explain(first, model, is_python=is_python)
    return f"{field}: {sentence}" if field else sentence


def explain(problem: ErrorDetails, model: type[BaseModel], *, is_python: bool = False) -> str:
    """Return the sentence for a problem that `model` found in a document.

    `is_python`: or in the arguments of its constructor, whose fields have their names in Python.
    """
    message, value = problem["msg"].removeprefix("Value error, "), problem["input"]
    field = to_camel(str(problem["loc"][-1])) if problem["loc"] else ""
    message = message[:1].lower() + message[1:]
    match problem["type"]:
        case "extra_forbidden":
            return _unknown_field(problem["loc"], model, is_python=is_python)
        case "missing":
            return "is required and missing"
        case "too_short":
            return f"has {problem['ctx']['actual_length']} entries, must have at least {problem['ctx']['min_length']}"
        case "too_long":
            return f"has {problem['ctx']['actual_length']} entries, must have at most {problem['ctx']['max_length']}"
        case "value_error" if isinstance(value, str) and _AN_ADDRESS in message:
            head, _, allowed = message.partition(", must be ")
            advice = advice_on_address(value)
            link = " It" if advice.endswith("?") else "; it"
            return f"{head}: {advice}{link} must be {allowed}" if advice else message
        case "value_error" if isinstance(value, (dict, list, tuple, BaseModel)) or "found" in message:
            return message
        case "model_type" | "tuple_type" if is_python:
            message = f"must be a {problem.get('ctx', {}).get('class_name', 'list')}"
        case "model_type":
            message = f"must be an object with {', '.join(sorted(_fields(_model_at(problem['loc'], model))))}"
        case "string_pattern_mismatch":
            message = WORDS_OF_PATTERN.get(problem["ctx"]["pattern"], message)
        case "string_type" if field in _WITH_UNIT and isinstance(value, int):
            return f"found {describe_value(value)}, must have a unit, for example {value or 24}Gi"
        case known if known in _TYPES:
            message = f"must be {_TYPES[known]}{_quotes(known, value)}"
    found = describe_value(value)
    advice = _ADVICE.get((field, found), _ADVICE.get((field,), ""))
    return f"found {found}, {message.replace('input should', 'must').replace('string should', 'must')}{advice}"


def describe_value(value: Any) -> str:
    """Return a JSON value for a sentence, at most 80 characters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, BaseModel):
        return f"a {type(value).__name__}"
    return "a list" if isinstance(value, (list, tuple)) else json.dumps(value, default=str)[:80]


def _quotes(problem: str, value: Any) -> str:
    """The remedy if only quotes are missing, or too many."""
    if problem in _NUMBERS and isinstance(value, str) and _NUMBERS[problem].fullmatch(value):
        return ", without quotes"
    return ", in quotes" if problem == "string_type" and isinstance(value, (int, float)) else ""


def _unknown_field(location: Location, model: type[BaseModel], *, is_python: bool) -> str:
    name = str(location[-1])
    fields = sorted(_fields(_model_at(location[:-1], model), is_python=is_python))
    places = _places((*location[:-1], _OTHER_NAMES.get(name, name)), model, is_python=is_python)
    if 0 < len(places) <= _MAX_PLACES:
        return f"unknown field; it is {' or '.join(places)}"
    close = difflib.get_close_matches(name, fields, n=1)
    # A name that other objects have is no misspelling.
    if close and not places:
        return f"unknown field; did you mean {close[0]}?"
    return f"unknown field; allowed are {', '.join(fields)}"


def _places(location: Location, model: type[BaseModel], *, is_python: bool) -> list[str]:
    """Find fields of that name under the innermost object that has any, to the spec."""
    *around, name = location
    # The place of a template's field does not help a user who wants to vary it.
    if _model_at(around, model) in (Grid, Overrides):
        return []
    for outer in [around[:depth] for depth in range(len(around), 0, -1)] or [[]]:
        found = [path for path in _paths(_model_at(outer, model), is_python=is_python) if path[-1] == name]
        if found:
            return [".".join(map(str, (*outer, *path))) for path in sorted(found, key=len)]
    return []


def _paths(model: type[BaseModel], *, is_python: bool) -> Iterator[Location]:
    """The location of each field, at any depth; without the index in a list."""
    for name, field in _fields(model, is_python=is_python).items():
        yield (name,)
        for inner in _models(field.annotation):
            yield from ((name, *path) for path in _paths(inner, is_python=is_python))


def _model_at(location: Sequence[int | str], model: type[BaseModel]) -> type[BaseModel]:
    for part in location:
        fields = _fields(model) | _fields(model, is_python=True)
        if isinstance(part, str) and part in fields:
            model = next(_models(fields[part].annotation), model)
    return model


def _fields(model: type[BaseModel], *, is_python: bool = False) -> dict[str, FieldInfo]:
    return {(not is_python and field.alias) or name: field for name, field in model.model_fields.items()}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that occur in a type, such as X in `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
