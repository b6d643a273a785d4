"""Writes objects of the API as JSON or YAML, as kubectl does."""

import io
import json
from collections.abc import Mapping
from typing import Any


def as_json(value: Mapping[str, Any]) -> str:
    """Indented, with a newline at its end."""
    return json.dumps(value, indent=4, ensure_ascii=False) + "\n"


def as_yaml(value: Mapping[str, Any]) -> str:
    """YAML 1.1, which `kubectl apply` reads: text like a number or a truth value is quoted."""
    # Imported here: commands that print a table must start fast.
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.version = (1, 1)
    text = io.StringIO()
    writer.dump(json.loads(json.dumps(value)), text)
    return text.getvalue().removeprefix("%YAML 1.1\n---\n")
