"""Errors of a Grafana dashboard, by the project's rules: its panels, and its metrics."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser as promql

ROOT = Path(__file__).parents[3]
FILES = ROOT / "helm" / "qlora-operator" / "files" / "dashboards"
VARIABLES = {"$namespace": "team", "$__rate_interval": "1m"}
"""Grafana's, with what a reader could choose."""

Object = dict[str, Any]


def dashboards() -> dict[str, Object]:
    """Each dashboard of the chart, by the name of its file."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(FILES.glob("*.json"))}


def panels(dashboard: Mapping[str, Any]) -> list[Object]:
    """Its panels without the headings of its rows."""
    found = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert found, "a dashboard that shows nothing"
    return found


def queries(panel: Mapping[str, Any]) -> list[str]:
    """Its queries, with Grafana's variables replaced."""
    found = [replace_variables(target["expr"]) for target in panel["targets"]]
    assert found, panel.get("title")
    return found


def replace_variables(expression: str) -> str:
    """The query as Grafana would send it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def complaints(dashboard: Mapping[str, Any], metrics: set[str]) -> Iterator[str]:
    """Yield a sentence for each defect. `metrics`: names of the existing series."""
    for panel in panels(dashboard):
        for problem in (*_of_panel(panel), *_of_queries(panel, metrics)):
            yield f"{panel.get('title') or 'a panel without title'}: {problem}"


def _of_panel(panel: Mapping[str, Any]) -> Iterator[str]:
    if not panel.get("title"):
        yield "no title"
    if not str(panel.get("description", "")).endswith("."):
        yield "no description"
    if not panel["fieldConfig"]["defaults"].get("unit"):
        yield "no unit"
    if not all(target.get("legendFormat") for target in panel["targets"]):
        yield "a query without a legend"


def _of_queries(panel: Mapping[str, Any], metrics: set[str]) -> Iterator[str]:
    for query in queries(panel):
        if "$" in query:
            yield f"an unknown variable: {query}"
            continue
        try:
            selectors = list(selected(promql.parse(query)))
        except ValueError as error:
            yield f"no PromQL: {query}: {error}"
            continue
        if unknown := sorted({str(selector.name) for selector in selectors} - metrics):
            yield f"no such metric: {', '.join(unknown)}"


def selected(expression: promql.Expr) -> Iterator[promql.VectorSelector]:
    """Each selector of series in it."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql.walk(expression, visit)
    yield from found
