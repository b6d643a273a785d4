"""Lays out the chart's Grafana dashboards, whose panels are in `dashboards.yaml`; run by `make generate`."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PANELS = Path(__file__).with_name("dashboards.yaml")
FOLDER = Path(__file__).parents[1] / "qlora-operator" / "files" / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS = 24
"""Of Grafana's grid."""


Panel = Mapping[str, Any]
"""A panel of `dashboards.yaml`."""


def render() -> dict[Path, str]:
    """Each dashboard's file and JSON."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    pages = yaml.safe_load(PANELS.read_text())
    return {FOLDER / f"{name}.json": encoder.encode(_build(name, page).build()) + "\n" for name, page in pages.items()}


def _build(name: str, page: Mapping[str, Any]) -> dashboard.Dashboard:
    builder = (
        dashboard.Dashboard(page["title"])
        .uid(f"qlora-{name}")
        .description(page["description"])
        .tags(["qlora"])
        .readonly()
        .time("now-6h", "now")
        .refresh("1m")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if page["namespaced"]:
        builder.with_variable(
            dashboard.QueryVariable("namespace")
            .label("Namespace")
            .datasource(_SOURCE)
            .query("label_values(qlora_jobs, namespace)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
    identities = itertools.count(1)
    for row in page["rows"]:
        builder.with_row(dashboard.Row(row["title"]).id(next(identities)))
        for panel in row["panels"]:
            builder.with_panel(_panel(panel, _COLUMNS // row["columns"]).id(next(identities)))
    return builder


def _panel(panel: Panel, span: int) -> stat.Panel | table.Panel | timeseries.Panel:
    built: stat.Panel | table.Panel | timeseries.Panel
    match panel.get("kind", "graph"):
        case "number":
            (query,) = panel["queries"].items()
            built = stat.Panel().height(4).with_target(_target(query, 0, instant=True))
            built.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("0")
        case "table":
            built = _table(panel)
        case _:
            built = _graph(panel)
    built.title(panel["title"]).description(panel["description"]).datasource(_SOURCE).span(span)
    return built.unit(panel.get("unit", "short"))


def _graph(panel: Panel) -> timeseries.Panel:
    built = timeseries.Panel().height(8).fill_opacity(10)
    built.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    built.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    if panel.get("fromZero", True):
        built.axis_soft_min(0)
    for number, query in enumerate(panel["queries"].items()):
        built.with_target(_target(query, number))
    return built


def _table(panel: Panel) -> table.Panel:
    """Return a row for each set of labels, a column for each query by its legend."""
    built = table.Panel().height(9)
    built.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    hidden = {"Time": True, **dict.fromkeys(panel["hidden"], True)}
    built.with_transformation(DataTransformerConfig(id_val="organize", options={"excludeByName": hidden}))
    for number, (query, unit) in enumerate(zip(panel["queries"].items(), panel["units"], strict=True)):
        built.with_target(_target(query, number, instant=True, table=True))
        shown = [DynamicConfigValue("displayName", query[0]), DynamicConfigValue("unit", unit)]
        built.override_by_name(f"Value #{_letter(number)}", shown)
    return built


def _target(query: tuple[str, str], number: int, *, instant: bool = False, table: bool = False) -> prometheus.Dataquery:
    legend, expression = query
    target = prometheus.Dataquery().datasource(_SOURCE).expr(expression).ref_id(_letter(number))
    target.legend_format(legend)
    if table:
        target.format(PromQueryFormat.TABLE)
    return target.instant() if instant else target.range()


def _letter(number: int) -> str:
    return chr(ord("A") + number)


if __name__ == "__main__":
    for file, text in render().items():
        file.write_text(text)
