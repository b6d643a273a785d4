"""The chart's Grafana dashboards: generated, readable, and about metrics that exist."""

from collections import Counter
from itertools import product

import promql_parser as promql
import pytest
import yaml

from helm.dashboards.__main__ import render
from qlora_operator.metrics.metrics import Metrics
from tests.support.project.alerts import FILE as ALERTS
from tests.support.project.dashboards import complaints, dashboards, panels, queries, selected

DASHBOARDS = dashboards()
KUBELET = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}


def series() -> set[str]:
    """The name of each series that the operator can have."""
    names: set[str] = set()
    for family in Metrics().registry.collect():
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {f"{family.name}{ending}" for ending in endings}
    return names


def asked() -> set[str]:
    """The name of each series in the queries of a dashboard or an alert."""
    expressions = [query for page in DASHBOARDS.values() for panel in panels(page) for query in queries(panel)]
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    expressions += [rule["expr"] for group in groups for rule in group["rules"]]
    return {str(selector.name) for expression in expressions for selector in selected(promql.parse(expression))}


def test_the_dashboards_match_make_generate() -> None:
    for file, text in render().items():
        assert file.read_text() == text, "run `make generate`"
    assert {file.stem for file in render()} == set(DASHBOARDS)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_each_panel_has_a_description_and_queries_existing_metrics(name: str) -> None:
    assert list(complaints(DASHBOARDS[name], series() | KUBELET)) == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_grafana_shows_each_panel_in_its_own_place_from_the_chosen_source(name: str) -> None:
    """The generator writes ids, letters, places and sources, whatever `dashboards.yaml` has."""
    page, taken = DASHBOARDS[name], Counter[tuple[int, int]]()
    for place in (panel["gridPos"] for panel in page["panels"]):
        across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        assert across.stop <= 24, place
        taken.update(product(across, down))
    assert set(taken.values()) == {1}
    identities = [panel["id"] for panel in page["panels"]]
    assert sorted(identities) == sorted({*identities})
    assert "datasource" in {variable["name"] for variable in page["templating"]["list"]}
    for panel in panels(page):
        letters = [target["refId"] for target in panel["targets"]]
        assert sorted(letters) == sorted({*letters} - {""}), panel["title"]
        sources = [asking["datasource"] for asking in (panel, *panel["targets"])]
        assert [one for one in sources if one != {"type": "prometheus", "uid": "${datasource}"}] == [], panel["title"]


def test_a_team_sees_its_own_namespace_in_every_panel() -> None:
    for panel in panels(DASHBOARDS["team"]):
        for query in queries(panel):
            # The join is on the namespace of the other selected series.
            selectors = [one for one in selected(promql.parse(query)) if "and on" not in query or one.name in KUBELET]
            assert selectors, query
            for selector in selectors:
                matchers = [(one.name, one.value) for one in selector.matchers.matchers]
                assert ("namespace", "team") in matchers, f"{panel['title']}: {query}"


def test_every_metric_is_in_a_dashboard_or_an_alert() -> None:
    """An unused number only costs."""
    histograms = {name.removesuffix("_bucket") for name in asked() if name.endswith("_bucket")}
    unseen = {name for name in series() - asked() if name.rpartition("_")[0] not in histograms}
    assert unseen == set()
