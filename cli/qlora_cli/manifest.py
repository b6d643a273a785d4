"""Reads a manifest as the API server would, and names file, line and field of each value that it would reject."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from math import inf
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qlora_api.printable import printable
from qlora_api.problems import Location, describe_value, explain, follows_from_another
from qlora_api.spec.job import KIND, QLoRAJobDocument
from qlora_api.sweep.spec import SWEEP_KIND, QLoRASweepDocument
from qlora_cli.yaml_problems import describe_notation

# The API server's limit for one object.
_MAX_BYTES = 1_500_000
# Written by the cluster and part of `kubectl get -o yaml`: not read from a manifest.
_OBSERVED = frozenset({"status"})
# Endings of files with rows.
_ROWS = frozenset({".csv", ".jsonl", ".parquet"})
# Errors of the YAML library for a value that does not match its tag.
_UNUSABLE_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)

Document = QLoRAJobDocument | QLoRASweepDocument


class ManifestError(Exception):
    """The manifest is invalid. A line per problem has file, line and field."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(map(printable, problems)))


class _NotJsonError(Exception):
    """The YAML value at `location` has no equivalent in JSON."""

    def __init__(self, value: Any, location: Location) -> None:
        tag = getattr(value, "tag", None)
        found = f"the tag {tag.value}" if tag is not None and tag.value else f"a {type(value).__name__}"
        super().__init__(f"found {found}, must be of a type of JSON: object, list, string, number, true, false or null")
        self.location = location


def load_manifest(path: Path) -> Document:
    """The QLoRAJob or QLoRASweep in a YAML 1.2 or JSON file, with the schema's defaults. Raises ManifestError.

    Values have the types that kubectl sends: `2e-4` is a number and `"64"` is not.
    """
    return _load(path)[0]


def load_object(path: Path) -> dict[str, Any]:
    """Return the object as its user wrote it, if valid. Raises ManifestError."""
    content: dict[str, Any] = json.loads(_load(path)[1])
    return content


def _load(path: Path) -> tuple[Document, str]:
    """Return the document with defaults, and as JSON without. Reads pipes once."""
    document = _parse(path)
    content = _json(document, path)
    model = _model(document, path)
    try:
        return model.model_validate_json(content, strict=True, by_alias=True, by_name=False), content
    except ValidationError as error:
        problems = [problem for problem in error.errors(include_url=False) if not follows_from_another(problem)]
        problems.sort(key=lambda problem: _line(document, problem["loc"]))
        raise ManifestError(*(_describe(path, document, problem, model) for problem in problems)) from error


def _model(document: CommentedMap, path: Path) -> type[Document]:
    """The model of the document's kind. Raises ManifestError for an unknown kind."""
    if "kind" not in document:
        raise ManifestError(f"{path}:{_line(document, ())}: kind: is required and missing: {KIND} or {SWEEP_KIND}")
    kind = _plain(document["kind"], ("kind",))
    if kind not in (KIND, SWEEP_KIND):
        found = describe_value(kind)
        raise ManifestError(f"{path}:{_line(document, ('kind',))}: kind: found {found}, must be {KIND} or {SWEEP_KIND}")
    return QLoRASweepDocument if kind == SWEEP_KIND else QLoRAJobDocument


def _json(document: CommentedMap, path: Path) -> str:
    """Return the document as kubectl sends it. Raises ManifestError."""
    try:
        if _size(document, {}) > _MAX_BYTES:
            raise ManifestError(f"{path}: larger than {_MAX_BYTES} bytes, or infinite, with its aliases expanded")
        return json.dumps({key: value for key, value in _plain(document, ()).items() if key not in _OBSERVED})
    except _NotJsonError as error:
        field = ".".join(map(str, error.location))
        raise ManifestError(f"{path}:{_line(document, error.location)}: {field}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: a number is too long, or the nesting too deep, for JSON: {error}") from error


def _size(value: Any, known: dict[int, float]) -> float:
    """Estimate the characters with aliases expanded, infinite if it contains itself."""
    if isinstance(value, str) or not isinstance(value, (Mapping, Sequence)):
        return len(value) + 1 if isinstance(value, str) else 1
    if id(value) not in known:
        known[id(value)] = inf
        inner = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(value)]


def _parse(path: Path) -> CommentedMap:
    """Parse the only document, with line numbers, and reject duplicate keys."""
    if _ROWS.intersection(path.suffixes):
        raise ManifestError(
            f"{path}: has rows, and this command reads a manifest, whose dataset.source names them; "
            f"`qlora data {path}` shows them"
        )
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ManifestError(f"{path}: larger than {_MAX_BYTES} bytes, the most that the API server accepts")
        documents = [document for document in YAML(typ="rt").load_all(content) if document is not None]
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    except MarkedYAMLError as error:
        line, problem = describe_notation(error, content)
        raise ManifestError(f"{path}:{line}: {problem}") from error
    except (YAMLError, RecursionError, *_UNUSABLE_VALUES) as error:
        raise ManifestError(f"{path}: not YAML: {(str(error).splitlines() or ['?'])[0]}") from error
    if not documents:
        raise ManifestError(f"{path}: empty, must hold one QLoRAJob or QLoRASweep")
    if len(documents) > 1:
        second = documents[1]
        line = second.lc.line + 1 if isinstance(second, (CommentedMap, CommentedSeq)) else 1
        raise ManifestError(
            f"{path}:{line}: a second document begins here, but a file holds one QLoRAJob or QLoRASweep: split the file"
        )
    if not isinstance(documents[0], CommentedMap):
        raise ManifestError(
            f"{path}:1: found a {type(documents[0]).__name__}, must be an object of kind QLoRAJob or QLoRASweep"
        )
    return documents[0]


def _plain(value: Any, location: Location) -> Any:
    """The value in plain JSON types. YAML's dates become text, as kubectl sends them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, (*location, key)) for key, inner in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Sequence):
        return [_plain(inner, (*location, index)) for index, inner in enumerate(value)]
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    raise _NotJsonError(value, location)


def _describe(path: Path, document: CommentedMap, problem: ErrorDetails, model: type[Document]) -> str:
    location = problem["loc"]
    field = ".".join(str(part) for part in location) or "document"
    return f"{path}:{_line(document, location)}: {field}: {explain(problem, model)}"


def _line(document: CommentedMap, location: Location) -> int:
    """Line of the innermost part of the location that the file has."""
    line, node = document.lc.line, document
    for part in location:
        # Keys added by a merge (<<) have no line.
        if not isinstance(node, (CommentedMap, CommentedSeq)) or part not in (node.lc.data or ()):
            break
        line, node = node.lc.data[part][0], node[part]
    return int(line) + 1
