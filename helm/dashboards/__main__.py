"""Writes the chart's Grafana dashboards, one for a team and one for the platform; run by `make generate`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

from helm.dashboards.panels import Graph, Number, Panel, Query, Row, Table
from helm.dashboards.platform import PLATFORM
from helm.dashboards.team import TEAM

FOLDER = Path(__file__).parents[1] / "qlora-operator" / "files" / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_COLUMNS = 24
"""Of Grafana's grid."""


@dataclass(frozen=True)
class Page:
    """One dashboard."""

    file: str
    title: str
    description: str
    rows: Sequence[Row]
    namespaced: bool
    """Whether it shows the jobs of one namespace, chosen by the reader."""


PAGES = (
    Page(
        "team.json",
        "QLoRA jobs of a team",
        "The fine-tuning jobs of one namespace: running, waiting, and their use of GPUs.",
        TEAM,
        namespaced=True,
    ),
    Page(
        "platform.json",
        "QLoRA platform",
        "The fine-tuning jobs of all namespaces, their GPUs, and the operator.",
        PLATFORM,
        namespaced=False,
    ),
)


def render() -> dict[Path, str]:
    """Each dashboard's file and JSON."""
    return {FOLDER / page.file: _encode(page) for page in PAGES}


def _encode(page: Page) -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(_build(page).build()) + "\n"


def _build(page: Page) -> dashboard.Dashboard:
    builder = (
        dashboard.Dashboard(page.title)
        .uid(f"qlora-{page.file.removesuffix('.json')}")
        .description(page.description)
        .tags(["qlora"])
        .readonly()
        .time("now-6h", "now")
        .refresh("1m")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    if page.namespaced:
        builder.with_variable(
            dashboard.QueryVariable("namespace")
            .label("Namespace")
            .datasource(_SOURCE)
            .query("label_values(qlora_jobs, namespace)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
        )
    identities = itertools.count(1)
    for row in page.rows:
        builder.with_row(dashboard.Row(row.title).id(next(identities)))
        for panel in row.panels:
            builder.with_panel(_panel(panel, _COLUMNS // row.columns).id(next(identities)))
    return builder


def _panel(panel: Panel, span: int) -> stat.Panel | table.Panel | timeseries.Panel:
    built: stat.Panel | table.Panel | timeseries.Panel
    match panel:
        case Number():
            built = stat.Panel().height(4).with_target(_target(panel.query, 0, instant=True))
            built.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("0")
        case Graph():
            built = _graph(panel)
        case Table():
            built = _table(panel)
    return built.title(panel.title).description(panel.description).unit(panel.unit).datasource(_SOURCE).span(span)


def _graph(panel: Graph) -> timeseries.Panel:
    built = timeseries.Panel().height(8).fill_opacity(10)
    built.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    built.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    if panel.from_zero:
        built.axis_soft_min(0)
    for number, query in enumerate(panel.queries):
        built.with_target(_target(query, number))
    return built


def _table(panel: Table) -> table.Panel:
    """One row for each set of labels, one column for each query: its legend is the column's title."""
    built = table.Panel().height(9)
    built.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    hidden = {"Time": True, **dict.fromkeys(panel.hidden, True)}
    built.with_transformation(DataTransformerConfig(id_val="organize", options={"excludeByName": hidden}))
    for number, (query, unit) in enumerate(panel.columns):
        built.with_target(_target(query, number, instant=True, table=True))
        shown = [DynamicConfigValue("displayName", query.legend), DynamicConfigValue("unit", unit)]
        built.override_by_name(f"Value #{_letter(number)}", shown)
    return built


def _target(query: Query, number: int, *, instant: bool = False, table: bool = False) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(_SOURCE).expr(query.expression).ref_id(_letter(number))
    target.legend_format(query.legend)
    if table:
        target.format(PromQueryFormat.TABLE)
    return target.instant() if instant else target.range()


def _letter(number: int) -> str:
    return chr(ord("A") + number)


if __name__ == "__main__":
    for file, text in render().items():
        file.write_text(text)
