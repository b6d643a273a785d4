"""Objects of the chart, rendered by real Helm with six sets of values."""

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from devcluster.product import ANY_MACHINE, SMALL_MACHINE
from qlora_api.profile import PROFILE_KIND
from qlora_operator.settings import Settings
from tests.support.chart.golden import golden_texts
from tests.support.chart.mutations import HARMLESS, mutations
from tests.support.chart.promises import PROMISES, Promise
from tests.support.chart.rendered import CHART, RELEASE, SETS, Helm, Object, Rendered, render

# The start of a branch, with what it begins with, but not of one that only rejects values.
BRANCH = re.compile(r"^ *\{\{-? (?P<tag>(?:if|else|with|range)\b[^}]*?) *\}\}$(?!\n\{\{- fail)(?:\n---$)?", re.M)


def test_helm_lint_passes(helm: Helm) -> None:
    for values in SETS.values():
        assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), values=values)


def test_the_renderings_are_those_that_reviewers_have_seen(charts: dict[str, Rendered]) -> None:
    for file, text in golden_texts(charts).items():
        assert file.read_text() == text, f"{file.name}: run `make generate` and look at what has changed"


def test_the_six_sets_of_values_take_every_branch_of_the_templates(helm: Helm, tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "chart")
    files = [*chart.glob("templates/*.yaml"), chart / "templates" / "_rules.tpl"]
    for file in files:
        file.write_text(BRANCH.sub(rf"\g<0>\n# taken: {file.stem}: \g<tag>", file.read_text()))
    texts = [helm("template", RELEASE, str(chart), values=values) for values in SETS.values()]
    branches = {branch for file in files for branch in re.findall("# taken: .*", file.read_text())}
    assert branches - set(re.findall("# taken: .*", "".join(texts))) == set()
    assert len(branches) > 40


@pytest.fixture(scope="session")
def renamed(helm: Helm) -> Rendered:
    return render(helm, {"fullnameOverride": "other", "replicas": 2, "networkPolicy": {"enabled": True}})


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise(charts: dict[str, Rendered], renamed: Rendered, promise: Promise) -> None:
    for name, chart in (charts | {"renamed": renamed}).items():
        for found, wanted in promise(chart):
            assert found == wanted, name


@pytest.mark.parametrize(("value", "name"), [("nameOverride", "qlora-operator-other"), ("fullnameOverride", "other")])
def test_the_administrator_can_replace_the_names(helm: Helm, value: str, name: str) -> None:
    objects = helm.template({value: "other", "crds": {"install": False}})
    names = [each["metadata"]["name"] for each in objects if each["kind"] != PROFILE_KIND]
    assert [each for each in names if not each.startswith(name)] == []


def test_a_change_of_any_field_breaks_a_promise_or_is_harmless(charts: dict[str, Rendered]) -> None:
    """A change by which a promise ends with an error is noticed too."""

    def is_noticed(chart: Rendered) -> bool:
        try:
            return any(found != wanted for promise in PROMISES for found, wanted in promise(chart))
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
            return True

    seen: set[str] = set()
    unnoticed = {change for chart in charts.values() for change in mutations(chart, seen) if not is_noticed(chart)}
    harmless = [pattern for patterns in HARMLESS.values() for pattern in patterns]
    excused = {pattern: {change for change in unnoticed if fnmatchcase(change, pattern)} for pattern in harmless}
    assert sorted(unnoticed.difference(*excused.values())) == []
    assert [pattern for pattern, changes in excused.items() if not changes] == []
    assert len(seen) > 1000


def test_the_charts_defaults_are_the_operators(charts: dict[str, Rendered]) -> None:
    default = Settings.model_validate(charts["defaults"].settings)
    assert default == Settings.model_validate({"leaderElection": {"enabled": True}})


@pytest.mark.parametrize("values", [SMALL_MACHINE, ANY_MACHINE])
def test_the_embedded_clusters_values_ask_for_no_label_of_a_gpu_node(helm: Helm, values: Object) -> None:
    (profile,) = (each for each in render(helm, values).of(PROFILE_KIND) if each["metadata"]["name"] == "default")
    assert profile["spec"]["nodeSelector"] == {"kubernetes.io/os": "linux"}
