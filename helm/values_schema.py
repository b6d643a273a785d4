"""Writes the definition of a profile in the chart's values.schema.json from its model; run by `make generate`."""

import json
from pathlib import Path
from typing import Any

from qlora_api.profile import Profile

SCHEMA = Path(__file__).parent / "qlora-operator" / "values.schema.json"
# The chart fills in the image where a profile names none.
_FILLED_IN = ("image",)


def definitions() -> dict[str, Any]:
    """The `$defs` of the values' schema: Profile and what it is made of, without what only Kubernetes understands."""
    document: dict[str, Any] = _plain(Profile.model_json_schema(by_alias=True))
    parts = document.pop("$defs")
    document["required"] = [name for name in document.pop("required") if name not in _FILLED_IN]
    return dict(sorted({**parts, "Profile": document}.items()))


def render() -> str:
    """The schema file with current definitions; everything else in it is written by hand."""
    schema = json.loads(SCHEMA.read_text())
    return json.dumps({**schema, "$defs": definitions()}, indent=2, ensure_ascii=False) + "\n"


def _plain(node: Any, *, names: bool = False) -> Any:
    """The node without titles and Kubernetes' own keywords; with `names`, its keys are properties, not keywords."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _plain(value, names=key in ("properties", "$defs") and not names)
        for key, value in node.items()
        if names or (key != "title" and not key.startswith("x-kubernetes-"))
    }


if __name__ == "__main__":
    SCHEMA.write_text(render())
