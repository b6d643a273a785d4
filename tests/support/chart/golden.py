"""The golden renderings: the defaults in full, and what other values change, as a merge patch.

They leave out versions, the labels of every object, and files of the project: definitions, dashboards, alerts.
Run by `make generate`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from devcluster import toolchain
from devcluster.layout import from_environment
from tests.support.chart.rendered import RELEASE, ROOT, SETS, VERSION, Helm, Object, Rendered, place, render
from tests.support.project.alerts import FILE as ALERTS
from tests.support.project.dashboards import FILES as DASHBOARDS

FOLDER = ROOT / "tests" / "api" / "chart" / "golden"
_HEADER = "# Written by `make generate`; do not edit.\n"
_NAMES = ("name", "alert")


def golden_texts(charts: Mapping[str, Rendered]) -> dict[Path, str]:
    """The file of each set, and its text."""
    defaults = _normalized(charts["defaults"])
    patches = {name: _merge_patch(defaults, _normalized(chart)) for name, chart in charts.items()}
    return {FOLDER / f"{name}.yaml": _dump(content) for name, content in (patches | {"defaults": defaults}).items()}


def _merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> Object:
    """The merge patch of JSON (RFC 7396) that makes the second from the first."""
    patch: Object = dict.fromkeys(before.keys() - after.keys())
    for name, value in after.items():
        if isinstance(value, dict) and isinstance(before.get(name), dict):
            patch |= {name: inner} if (inner := _merge_patch(before[name], value)) else {}
        elif name not in before or value != before[name]:
            patch[name] = value
    return patch


def _normalized(chart: Rendered) -> Object:
    """The documents by place. One that equals another is the same, which YAML refers to."""
    documents = {place(each): _by_name(_without_repetition(each)) for each in [*chart.objects, *chart.door]}
    texts = {where: json.dumps(content, sort_keys=True) for where, content in documents.items()}
    first = {texts[where]: content for where, content in reversed(documents.items())}
    return {where: first[text] for where, text in texts.items()}


def _without_repetition(document: Object) -> Object:
    metadata = {name: value for name, value in document["metadata"].items() if name not in ("name", "namespace")}
    metadata["labels"] = dict(metadata.get("labels", {}).items() - _STANDARD.items())
    content = {name: value for name, value in document.items() if name not in ("kind", "metadata")}
    content |= {name: value for name, value in metadata.items() if value}
    return _merge_patch(_by_name(_own_file(document)), _by_name(content))


_STANDARD = {
    "app.kubernetes.io/name": "qlora-operator",
    "app.kubernetes.io/instance": RELEASE,
    "app.kubernetes.io/version": VERSION,
    "app.kubernetes.io/managed-by": "Helm",
    "helm.sh/chart": f"qlora-operator-{VERSION}",
}


def _own_file(document: Object) -> Object:
    """The part of the document that a file of the project decides."""
    match document["kind"]:
        case "CustomResourceDefinition":
            content = yaml.load((ROOT / "crds" / f"{document['metadata']['name']}.yaml").read_text(), yaml.CSafeLoader)
            return {name: content[name] for name in ("apiVersion", "spec")}
        case "ConfigMap":
            return {"data": {name: (DASHBOARDS / name.removeprefix("qlora-")).read_text() for name in document["data"]}}
        case "PrometheusRule":
            return {"spec": yaml.safe_load(ALERTS.read_text())}
    return {}


def _by_name(node: Any) -> Any:
    """Make a mapping of a list whose items have names, so that a patch has what differs."""
    if isinstance(node, dict):
        return {name: _by_name(value) for name, value in node.items()}
    if not isinstance(node, list):
        return node
    for key in _NAMES:
        if node and all(isinstance(item, dict) and key in item for item in node):
            return {item[key]: {name: _by_name(value) for name, value in item.items() if name != key} for item in node}
    return node


def _dump(content: Object) -> str:
    return _HEADER + yaml.safe_dump(content, width=120, default_flow_style=None).replace(VERSION, "VERSION")


def main() -> None:
    helm = Helm(toolchain.build(from_environment(), ["helm"])["helm"])
    for file, text in golden_texts({name: render(helm, values) for name, values in SETS.items()}).items():
        file.write_text(text)


if __name__ == "__main__":
    main()
