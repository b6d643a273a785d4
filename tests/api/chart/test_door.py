"""Objects of the chart for the door."""

import pytest
import yaml

from devcluster.errors import ClusterError
from qlora_door.settings import DoorSettings
from tests.support.chart.rendered import NAMESPACE, SETTINGS, Helm, Object, Rendered, only, place

SETS = ("limited", "monitored", "available")


def pod_of(chart: Rendered) -> Object:
    return dict(only(chart.door, "Deployment")["spec"]["template"]["spec"])


def test_there_is_no_door_by_default(charts: dict[str, Rendered]) -> None:
    assert charts["defaults"].door == []


@pytest.mark.parametrize("name", SETS)
def test_the_settings_are_valid_and_the_ports_open(charts: dict[str, Rendered], name: str) -> None:
    template = only(charts[name].door, "Deployment")["spec"]["template"]
    settings = DoorSettings.model_validate(yaml.safe_load(template["metadata"]["annotations"][SETTINGS]))
    assert list(settings.namespaces) == charts[name].values["namespaces"]
    (container,) = pod_of(charts[name])["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"api": settings.port, "probes": settings.probe_port, "metrics": settings.metrics_port}
    (port,) = only(charts[name].door, "Service")["spec"]["ports"]
    assert port == {"name": "api", "port": 80, "targetPort": "api"}


@pytest.mark.parametrize("name", SETS)
def test_the_pods_are_restricted_and_not_the_operators(charts: dict[str, Rendered], name: str) -> None:
    chart, pod = charts[name], pod_of(charts[name])
    (container,), (own,) = pod["containers"], chart.pod["containers"]
    assert container["securityContext"] == own["securityContext"]
    assert pod["securityContext"] == chart.pod["securityContext"]
    assert container["image"] == own["image"]
    assert pod["serviceAccountName"] == only(chart.door, "ServiceAccount")["metadata"]["name"]
    selected = only(chart.door, "Deployment")["spec"]["selector"]["matchLabels"]
    labels = only(chart.door, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert selected.items() <= labels.items()
    assert selected == only(chart.door, "Service")["spec"]["selector"]
    assert not chart.deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_with_namespaces_its_rights_end_there(charts: dict[str, Rendered]) -> None:
    roles = {place(each): each["rules"] for each in charts["limited"].door if each["kind"] in ("Role", "ClusterRole")}
    resources = {where: {each for rule in rules for each in rule["resources"]} for where, rules in roles.items()}
    bounded = {"qlorajobs", "configmaps"}
    assert resources == {
        "ClusterRole qlora-operator-door": {"tokenreviews", "serviceaccounts", "users", "groups"},
        "Role team-a/qlora-operator-door": bounded,
        "Role team-b/qlora-operator-door": bounded,
    }
    account = {"kind": "ServiceAccount", "name": "qlora-operator-door", "namespace": NAMESPACE}
    bindings = [each for each in charts["limited"].door if each["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    assert [each["subjects"] for each in bindings] == [[account]] * 3


def test_a_door_that_passes_tokens_on_has_no_role(charts: dict[str, Rendered]) -> None:
    assert not {"Role", "ClusterRole"} & {each["kind"] for each in charts["monitored"].door}


def test_a_door_needs_models(helm: Helm) -> None:
    with pytest.raises(ClusterError, match=r"door\.settings\.models"):
        helm.template({"door": {"enabled": True}})
