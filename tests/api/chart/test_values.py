"""Values of the chart: those of an older release, wrong ones and large ones."""

import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from devcluster.errors import ClusterError
from qlora_api.profile import PROFILE_KIND, Profile
from qlora_operator.settings import Settings
from tests.support.chart.rendered import (
    CHART,
    RELEASE,
    ROOT,
    SETTINGS,
    VALUES,
    Helm,
    Object,
    render,
    without,
)


def with_values(helm: Helm, folder: Path, values: Object) -> list[Object]:
    """Render as `helm upgrade --reuse-values`: these are the defaults, and no others.

    Settings and profiles are as the operator reads them, absent ones included.
    """
    chart = shutil.copytree(CHART, folder / "reused", dirs_exist_ok=True)
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = render(helm, {}, chart)
    annotations = rendered.deployment["spec"]["template"]["metadata"]["annotations"]
    annotations[SETTINGS] = Settings.model_validate(rendered.settings)
    for profile in rendered.of(PROFILE_KIND):
        profile["spec"] = Profile.model_validate(profile["spec"])
    return rendered.objects


def everything_on(values: Object) -> Object:
    """The values with every object of the chart in use."""
    on = copy.deepcopy(values)
    on["networkPolicy"]["enabled"] = on["metrics"]["serviceMonitor"]["enabled"] = True
    return on


def keys(values: Object, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from keys(value, (*above, name))


PREVIOUS_VALUES: Object = yaml.safe_load((ROOT / "tests/support/previous_release/values.yaml").read_text())
NEW_KEYS = [path for path in keys(VALUES) if path not in set(keys(PREVIOUS_VALUES))]
# Absence has a meaning: the platform chooses, no GPU, no request or limit.
ABSENT_BY_CHOICE = {("runAs",), ("profiles", "default", "runAs"), ("profiles", "default", "gpuResource")} | {
    path for path in keys(VALUES) if path[0] == "resources"
}
# A required value that is absent is rejected by name.
NO_ALERT = "there is no alert QLoRAQueue; there are: QLoRAJobStalled, QLoRAJobsFailing"
CLEAR_FAILURE = re.compile(r"missing property '\w+'")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=".".join(path), marks=[] if path in NEW_KEYS else [pytest.mark.slow])
        for path in keys(VALUES)
        if path not in ABSENT_BY_CHOICE
    ],
)
def test_a_value_that_the_older_chart_lacks_has_its_default_or_is_required(
    helm: Helm, tmp_path: Path, whole: list[Object], path: tuple[str, ...]
) -> None:
    try:
        objects = with_values(helm, tmp_path, without(everything_on(VALUES), path))
    except ClusterError as rejected:
        if not CLEAR_FAILURE.search(str(rejected)):
            raise
    else:
        assert objects == whole


@pytest.fixture(scope="module")
def whole(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """Render the chart with all values."""
    return with_values(helm, tmp_path_factory.mktemp("whole"), everything_on(VALUES))


def test_an_upgrade_that_reuses_previous_values_names_the_missing_ones(helm: Helm, tmp_path: Path) -> None:
    assert ("settings", "leaderElection") in NEW_KEYS
    with pytest.raises(ClusterError, match="missing property 'leaderElection'"):
        with_values(helm, tmp_path, PREVIOUS_VALUES)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"imgae": {}}, "'imgae' not allowed"),
        ({"settings": {"progres": {}}}, "'progres' not allowed"),
        ({"profiles": {"default": {"gpuResorce": "nvidia.com/gpu"}}}, "'gpuResorce' not allowed"),
        ({"profiles": {"default": {"device": "tpu"}}}, "/profiles/default/device"),
        ({"profiles": {"default": {"modelCache": {}}}}, "missing property 'claimName'"),
        ({"profiles": {"default": {"modelCache": {"claimName": "Models"}}}}, "/profiles/default/modelCache/claimName"),
        ({"profiles": {"default": {"httpsProxy": "http://team:password@proxy:3128"}}}, "/profiles/default/httpsProxy"),
        ({"profiles": {"default": {"cloudIdentity": {"provider": "oracle"}}}}, "/profiles/default/cloudIdentity"),
        ({"profiles": {"default": None}}, "missing property 'default'"),
        ({"profiles": {"A_100": {}}}, "A_100"),
        ({"namespaces": "team-a"}, "/namespaces"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"jobNetworkPolicies": {"namespaces": ["team-a"]}}, "'namespaces' not allowed"),
        ({"jobNetworkPolicies": {"dns": {"ports": [*range(1, 10)]}}}, "/jobNetworkPolicies/dns/ports"),
        ({"jobNetworkPolicies": {"dns": {"to": []}}}, "/jobNetworkPolicies/dns/to"),
        ({"networkPolicy": {"apiServerPorts": None}}, "missing property 'apiServerPorts'"),
        ({"crds": {"keep": None}}, "missing property 'keep'"),
        ({"jobNetworkPolicies": {"servers": [{"cidr": "example.org"}]}}, "/jobNetworkPolicies/servers/0/cidr"),
        ({"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}}, "needs metrics.service"),
        ({"metrics": {"prometheusRule": {"enabled": True, "disabled": ["QLoRAQueue"]}}}, NO_ALERT),
        ({"metrics": {"prometheusRule": {"enabled": True, "overrides": {"QLoRAQueue": {"for": "1h"}}}}}, NO_ALERT),
        ({"replicas": 2, "settings": {"leaderElection": {"enabled": False}}}, "needs settings.leaderElection.enabled"),
        # Prepare could bind its volume where there is no GPU.
        ({"profiles": {"default": {"nodeSelector": {}}}}, "profiles.default: gpuResource is set"),
        ({"profiles": {"big": {"nodeSelector": {}}}}, "profiles.big: gpuResource is set"),
        ({"profiles": {"big": {"gpuResource": "amd.com/gpu"}}}, "Set nodeSelector to labels"),
        ({"profiles": {"big": {"gpuResource": "amd.com/gpu", "workspace": {"topology": "zonal"}}}}, "Set nodeSelector"),
    ],
)
def test_wrong_values_are_rejected_by_name(helm: Helm, values: Object, complaint: str) -> None:
    with pytest.raises(ClusterError) as rejected:
        helm.template(values)
    assert complaint in str(rejected.value)


@pytest.mark.parametrize("version", ["1.34.0", "1.34.4-eks-a1b2c3d", "1.40.0"])
def test_a_kubernetes_of_the_documented_version_or_newer_is_taken(helm: Helm, version: str) -> None:
    assert "kind: Deployment" in helm("template", RELEASE, str(CHART), "--kube-version", version)


def test_an_older_kubernetes_is_rejected_with_both_versions(helm: Helm) -> None:
    with pytest.raises(ClusterError, match=r"requires kubeVersion: >=1\.34\.0-0 .*1\.33\.9"):
        helm("template", RELEASE, str(CHART), "--kube-version", "1.33.9")
