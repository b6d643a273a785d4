"""The chart, installed by real Helm into a real API server."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from devcluster.controlplane import ControlPlane, running
from devcluster.errors import ClusterError
from tests.support.chart.promises import OWN_RIGHTS, PROFILE_RIGHTS, TENANTS, rights, rights_of
from tests.support.chart.rendered import (
    CHART,
    NAMESPACE,
    RELEASE,
    ROOT,
    SETS,
    VALUES,
    Helm,
    Object,
    settings_in,
)
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """Start a control plane without the definition, which Helm installs."""
    with running(controller_manager=True) as plane:
        yield plane


@pytest.fixture(scope="module")
def installed(helm: Helm, plane: ControlPlane) -> Helm:
    """Helm on a cluster with the chart's default release, in a restricted namespace."""
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    connected = Helm(helm.program, plane.kubeconfig)
    # Without --wait, Helm may create the profile before its kind is served, and fails.
    install = partial(connected, "upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE)
    eventually(install, seconds=60, what="the installation")
    return connected


def test_the_notes_name_the_next_commands(installed: Helm) -> None:
    notes = installed("get", "notes", RELEASE, "--namespace", NAMESPACE)
    assert "in all namespaces" in notes
    assert f"kubectl --namespace {NAMESPACE} rollout status deployment/{RELEASE}" in notes


def test_the_api_server_takes_every_object_as_it_is_written(helm: Helm, installed: Helm, plane: ControlPlane) -> None:
    for namespace in ("team-a", "team-b", "monitoring"):
        plane.kubectl("create", "namespace", namespace)
    for values in SETS.values():
        # This API server does not have the kinds of the Prometheus operator.
        objects = [
            each for each in helm.template(values) if not each["apiVersion"].startswith("monitoring.coreos.com/")
        ]
        # As Helm upgrades: another manager's ports of the Service would be added to the installed ones.
        applied = ("apply", "--server-side", "--field-manager=helm", "--force-conflicts")
        options = ("--dry-run=server", "--validate=strict", "--filename=-")
        plane.kubectl(*applied, *options, input_text=yaml.safe_dump_all(objects))


def test_the_api_server_finds_no_mistake_in_the_admission_policies(installed: Helm, plane: ControlPlane) -> None:
    def checked() -> list[Object] | None:
        found = plane.kubectl.get("validatingadmissionpolicies")["items"]
        return found if all("observedGeneration" in each.get("status", {}) for each in found) else None

    policies = eventually(checked, seconds=60, what="the types of all expressions") or []
    assert {each["metadata"]["name"] for each in policies} >= {f"{RELEASE}-jobs", f"{RELEASE}-cells"}
    assert [each["status"]["typeChecking"] for each in policies if each["status"].get("typeChecking")] == []


def test_pod_security_admits_the_operators_pod(installed: Helm, plane: ControlPlane) -> None:
    def pods() -> list[Object]:
        return list(plane.kubectl.get("pods", "--namespace", NAMESPACE)["items"])

    admitted, *_ = eventually(pods, seconds=60, what="a pod of the ReplicaSet in a restricted namespace")
    metadata, spec = {"name": "unrestricted", "namespace": NAMESPACE}, admitted["spec"] | {"securityContext": {}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    with pytest.raises(ClusterError, match="PodSecurity"):
        plane.kubectl("create", "--dry-run=server", "--filename=-", input_text=json.dumps(pod))


def test_the_api_server_grants_the_charts_rights_and_no_other(installed: Helm, plane: ControlPlane) -> None:
    """To the operator, and to tenants with the cluster's roles that the chart extends."""

    def granted(user: str, namespace: str = "default") -> dict[str, set[str]]:
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
        body = json.dumps(review | {"spec": {"namespace": namespace}})
        arguments = ("create", f"--as={user}", "--validate=false", "--output=json", "--filename=-")
        return rights_of(json.loads(plane.kubectl(*arguments, input_text=body))["status"]["resourceRules"])

    for role in TENANTS:
        arguments = (f"--clusterrole={role}", f"--user={role}er", "--namespace=default")
        plane.kubectl("create", "rolebinding", role, *arguments)
    view, edit = (TENANTS[role][0] for role in ("view", "edit"))
    wanted = view, {kind: verbs | edit.get(kind, set()) for kind, verbs in view.items()}

    def is_granted() -> bool:
        found = (granted(user).items() for user in ("viewer", "editer"))
        return wanted == tuple({kind: verbs for kind, verbs in each if "qlora.dev" in kind} for each in found)

    assert eventually(is_granted, seconds=60, what="the rights of tenants")
    accounts = f"system:serviceaccount:{NAMESPACE}"
    of_each_account = granted(f"{accounts}:default")
    assert granted(f"{accounts}:{RELEASE}") == of_each_account | rights(VALUES) | PROFILE_RIGHTS
    assert granted(f"{accounts}:{RELEASE}", NAMESPACE) == of_each_account | rights(VALUES) | PROFILE_RIGHTS | OWN_RIGHTS


def test_a_profile_outlives_upgrade_and_rollback(installed: Helm, plane: ControlPlane) -> None:
    """Its status has the GPU hours of each namespace, which no other object has."""

    def upgrade(*options: str) -> None:
        installed("upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE, *options)

    def stored() -> tuple[str, int | None, Object]:
        profile = plane.kubectl.get("qloraprofile", "default")
        return profile["metadata"]["uid"], profile["spec"].get("finishedJobSeconds"), profile.get("status", {})

    uid, status = with_status(plane)
    upgrade()
    upgrade("--set", "profiles.default.finishedJobSeconds=7200")
    assert stored() == (uid, 7200, status)
    installed("rollback", RELEASE, "--namespace", NAMESPACE)
    assert stored() == (uid, 86_400, status)
    installed("rollback", RELEASE, "1", "--namespace", NAMESPACE)
    assert stored()[::2] == (uid, status), "the first revision may have created it in a hook"


def test_uninstalling_keeps_jobs_and_profiles_and_installing_again_finds_them(
    installed: Helm, plane: ControlPlane
) -> None:
    def stored() -> tuple[str, str, Object]:
        profile = plane.kubectl.get("qloraprofile", "default")
        job = plane.kubectl.get("qlorajob", "support-assistant")
        return job["metadata"]["uid"], profile["metadata"]["uid"], profile["status"]

    job = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]["artifacthub.io/crdsExamples"]
    plane.kubectl.apply(yaml.safe_dump_all(yaml.safe_load(job)))
    with_status(plane)
    before = stored()
    installed("uninstall", RELEASE, "--namespace", NAMESPACE)
    assert stored() == before
    with pytest.raises(ClusterError, match="NotFound"):
        plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)
    installed("upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE)
    assert stored() == before


def with_status(plane: ControlPlane) -> tuple[str, Object]:
    """Write a status of the default profile, as the operator does; returns its UID and this."""
    status = {"observedGeneration": 1}
    options = ("--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}")
    plane.kubectl("patch", "qloraprofile", "default", *options)
    return plane.kubectl.get("qloraprofile", "default")["metadata"]["uid"], status


def test_upgrade_and_rollback_change_the_definition_and_no_job(
    installed: Helm, plane: ControlPlane, tmp_path: Path
) -> None:
    """The older release has the chart of today without one field."""
    older = shutil.copytree(CHART, tmp_path / "older")
    file = older / "files" / "qlorajobs.qlora.dev.yaml"
    definition = yaml.safe_load(file.read_text())
    fields = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del fields["training"]["properties"]["samples"]
    file.write_text(yaml.safe_dump(definition))
    manifest = yaml.safe_load((ROOT / "examples" / "instructions.yaml").read_text())

    def apply(name: str, training: Object) -> str:
        metadata = {"name": name, "namespace": "default"}
        job = {**manifest, "metadata": metadata, "spec": {**manifest["spec"], "training": training}}
        return plane.kubectl("apply", "--validate=strict", "--filename=-", input_text=json.dumps(job))

    def upgrade(chart: Path) -> None:
        installed("upgrade", "--install", RELEASE, str(chart), "--namespace", NAMESPACE)

    def training(name: str) -> Object:
        return dict(plane.kubectl.get("qlorajob", name, "--namespace=default")["spec"]["training"])

    apply("before", {"maxSteps": 7})
    upgrade(older)
    eventually(lambda: "samples" not in training("before"), seconds=60, what="the older definition")
    before = plane.kubectl.get("qlorajob", "before", "--namespace=default")

    upgrade(CHART)
    assert eventually(lambda: apply("after", {"samples": 5}), seconds=60, what="the newer definition")
    assert training("after")["samples"] == 5
    upgraded = plane.kubectl.get("qlorajob", "before", "--namespace=default")
    assert upgraded["metadata"] == before["metadata"]
    assert upgraded["spec"]["training"].pop("samples") == 3
    assert upgraded["spec"] == before["spec"]

    installed("rollback", RELEASE, "--namespace", NAMESPACE)
    eventually(lambda: "samples" not in training("after"), seconds=60, what="the older definition")
    assert plane.kubectl.get("qlorajob", "before", "--namespace=default") == before

    upgrade(CHART)
    eventually(lambda: training("after").get("samples") == 5, seconds=60, what="what was set before")


def test_each_release_keeps_its_own_settings_and_a_rollback_brings_them_back(
    installed: Helm, plane: ControlPlane
) -> None:
    """An old container that restarts during an upgrade would reject new settings."""

    def workers(template: Object) -> int:
        return int(yaml.safe_load(settings_in(template))["workers"])

    def revisions() -> dict[str, int]:
        """The settings of each ReplicaSet, by its name."""
        listed = plane.kubectl.get("replicasets", "--namespace", NAMESPACE)["items"]
        return {one["metadata"]["name"]: workers(one["spec"]["template"]) for one in listed}

    def upgrade(number: int) -> None:
        installed("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE, "--set", f"settings.workers={number}")
        eventually(lambda: number in revisions().values(), seconds=60, what="the new ReplicaSet")

    upgrade(3)
    before = revisions()
    upgrade(5)
    assert before.items() < revisions().items()
    installed("rollback", RELEASE, "--namespace", NAMESPACE)
    assert workers(plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)["spec"]["template"]) == 3
    mounted = plane.kubectl.get("configmaps", "--namespace", NAMESPACE)["items"]
    assert [one["metadata"]["name"] for one in mounted] == ["kube-root-ca.crt"]
