"""The parts of a dashboard: titles, units and queries, without Grafana's layout."""

from collections.abc import Sequence
from dataclasses import dataclass

RUNNING = 'phase=~"Preparing|Training|Publishing"'


@dataclass(frozen=True)
class Query:
    """An expression in PromQL, and the name of each of its series."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Number:
    """The latest value, in large digits."""

    title: str
    description: str
    unit: str
    query: Query


@dataclass(frozen=True)
class Graph:
    """Lines over time."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    from_zero: bool = True


@dataclass(frozen=True)
class Table:
    """The latest values, a column with its unit for each query."""

    title: str
    description: str
    columns: Sequence[tuple[Query, str]]
    hidden: Sequence[str] = ()
    unit: str = "short"


Panel = Number | Graph | Table


@dataclass(frozen=True)
class Row:
    """Panels below one heading, so many in a line."""

    title: str
    columns: int
    panels: Sequence[Panel]


def free_space(selector: str = "") -> str:
    """Free share of the workspaces that running jobs write to, of the selected series of the kubelets."""
    return (
        f"min by (namespace, persistentvolumeclaim) (kubelet_volume_stats_available_bytes{selector})\n"
        f"/ max by (namespace, persistentvolumeclaim) (kubelet_volume_stats_capacity_bytes{selector})\n"
        "and on (namespace, persistentvolumeclaim) qlora_job_info"
    )


def percentiles(histogram: str, by: str = "", window: str = "$__rate_interval") -> tuple[Query, Query]:
    """The median and the 95th percentile."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    rate = f"sum by ({labels}) (rate({histogram}_bucket[{window}]))"
    return (
        Query(f"histogram_quantile(0.5, {rate})", f"median{legend}"),
        Query(f"histogram_quantile(0.95, {rate})", f"95 %{legend}"),
    )
