"""Small changes of a rendered chart: a field is changed, dropped or added."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.chart.rendered import Rendered, place

# The golden renderings show these, and other tests use them: definitions, metrics, alerts and dashboards.
SHOWN = {"CustomResourceDefinition", "ConfigMap", "PrometheusRule", "Service", "ServiceMonitor"}
HARMLESS: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("harmless.yaml").read_text())


def mutations(chart: Rendered, seen: set[str]) -> Iterator[str]:
    """Make each change in the chart, which has it until the next one; yield what it is.

    `seen`: changes to leave out, as another chart has the same field; those made are added.
    """
    for document in (each for each in chart.objects if each["kind"] not in SHOWN):
        kind, where = document["kind"], place(document)
        for holder, key, path in _fields(document, ""):
            field = f"{where}: {path} = {holder[key]!r}"
            if field not in seen:
                seen.add(field)
                yield from (f"{kind} {path} {change}" for change in _changes(holder, key))


def _fields(node: Any, above: str) -> Iterator[tuple[Any, Any, str]]:
    """Each field below the node: what holds it, its key there, and its path."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        path = f"{above}.{key}".strip(".")
        yield node, key, path
        yield from _fields(value, path)


def _changes(holder: Any, key: Any) -> Iterator[str]:
    """Change the field in each way, one after another, and restore it in the end."""
    value, before = holder[key], copy.copy(holder)
    for change, other in _others(value):
        holder[key] = other
        yield change
        holder[key] = value
    del holder[key]
    yield "dropped"
    holder.clear()
    holder.update(before) if isinstance(holder, dict) else holder.extend(before)


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    """Other values in its place. An empty item allows everything in a rule."""
    match value:
        case bool():
            yield "changed", not value
        case int():
            yield "changed", value + 1
        case str():
            yield "changed", f"{value}-other"
        case dict():
            yield "extended", value | {"other": "added"}
        case [{}, *_]:
            yield "extended", [*value, {}]
        case [_, *_]:
            yield "extended", [*value, "added"]
