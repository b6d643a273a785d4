"""The shipped files in Argo CD's code: Lua, diffs of live jobs, ApplicationSets."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import toolchain
from devcluster.controlplane import ControlPlane
from devcluster.layout import from_environment
from gitops import generate
from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.cluster.phases import cases
from tests.support.manifests import MINIMAL, NUMBERS, Manifest, with_value

SWEEP = yaml.safe_load((generate.ARGO_CD / "sweep.yaml").read_text())


def ask(**content: object) -> dict[str, Any]:
    """Argo CD's verdict with the shipped settings."""
    program = toolchain.built(from_environment(), ["argo-cd"])["argo-cd"]
    settings = yaml.safe_load(generate.VALUES.read_text())["configs"]["cm"]
    given = json.dumps({"settings": settings, **content})
    said = subprocess.run([program], input=given, capture_output=True, text=True, check=False, timeout=60)
    assert said.returncode == 0, said.stderr
    return dict(json.loads(said.stdout))


def synced(cluster: Nodeless, manifest: Manifest, *flags: str) -> None:
    """Apply as Argo CD does."""
    cluster.kubectl("apply", "--filename=-", *flags, input_text=json.dumps(manifest))


def act(cluster: Nodeless, name: str, spec: dict[str, Any]) -> None:
    """Write as Argo CD's API server does for an action."""
    change = f"--patch={json.dumps({'spec': spec})}"
    where = (f"--namespace={NAMESPACE}", "--type=merge", "--field-manager=argocd-server")
    cluster.kubectl("patch", "qlorajob", name, change, *where)


@pytest.mark.parametrize(
    "flags", [(), ("--server-side", "--field-manager=argocd-controller")], ids=["client-side", "server-side"]
)
def test_the_next_sync_keeps_a_suspension_that_the_manifest_leaves_out(
    operated: Nodeless, flags: tuple[str, ...]
) -> None:
    name = f"argo-{len(flags)}"
    manifest = MINIMAL | {"metadata": {"name": name, "namespace": NAMESPACE}}
    synced(operated, manifest, *flags)
    act(operated, name, {"suspend": True})
    operated.wait_for_phase(name, "Suspended")
    synced(operated, manifest, *flags)
    assert operated.job(name)["spec"]["suspend"] is True


@pytest.mark.slow
def test_argo_cds_lua_has_what_the_health_and_the_actions_use() -> None:
    kind = {key: MINIMAL[key] for key in ("apiVersion", "kind")}
    told = ask(objects=[kind | case.body for case in cases()])["objects"]
    found = [(each["health"]["status"], list(each["actions"])) for each in told]
    assert found == [(case.health, [case.action] if case.action else []) for case in cases()]


@pytest.mark.slow
def test_argo_cd_sees_drift_only_in_fields_that_the_manifest_has(operated: Nodeless) -> None:
    manifest = MINIMAL | {"metadata": {"name": "argo-drift", "namespace": NAMESPACE}}
    awake = with_value(manifest, "spec.suspend", False)
    numbers = NUMBERS | {"metadata": {"name": "argo-numbers", "namespace": NAMESPACE}}

    def drifted(desired: Manifest) -> bool:
        live = operated.job(desired["metadata"]["name"])
        return bool(ask(compared=[{"desired": desired, "live": live}])["drifted"][0])

    synced(operated, numbers)
    assert not drifted(numbers)
    assert drifted(with_value(numbers, "spec.lora.dropout", 0.3))
    synced(operated, manifest)
    operated.wait_for_phase("argo-drift", "Preparing")
    assert not drifted(manifest)
    act(operated, "argo-drift", {"suspend": True})
    operated.wait_for_phase("argo-drift", "Suspended")
    assert not drifted(manifest)
    assert drifted(awake)
    assert drifted(with_value(manifest, "spec.training.seed", 9))


def kustomized(application: dict[str, Any], folder: Path, cluster: ControlPlane) -> str:
    """The manifests of the Application: its options are fields of a kustomization."""
    options = application["spec"]["source"]["kustomize"]
    (folder / "job.yaml").write_text(json.dumps(with_value(MINIMAL, "metadata", {"name": "support-bot"})))
    (folder / "kustomization.yaml").write_text(json.dumps({"resources": ["job.yaml"], **options}))
    return cluster.kubectl("kustomize", str(folder))


def check_sweep(applications: list[dict[str, Any]], plane: ControlPlane, folder: Path) -> None:
    elements = SWEEP["spec"]["generators"][0]["list"]["elements"]
    assert len(applications) == len(elements) > 0
    for application, element in zip(applications, elements, strict=True):
        assert application["metadata"]["name"] == f"support-bot-{element['name']}"
        text = kustomized(application, folder, plane)
        job = json.loads(plane.kubectl("create", "--dry-run=server", "--output=json", "--filename=-", input_text=text))
        assert job["metadata"]["name"] == f"support-bot-{element['name']}"
        found = (job["spec"]["lora"]["rank"], job["spec"]["training"]["learningRate"])
        assert found == (int(element["rank"]), float(element["learningRate"]))
        assert job["spec"]["model"] == MINIMAL["spec"]["model"]


def test_the_sweep_makes_one_valid_job_of_each_element(plane: ControlPlane, tmp_path: Path) -> None:
    template = json.dumps(SWEEP["spec"]["template"])
    applications = []
    for element in SWEEP["spec"]["generators"][0]["list"]["elements"]:
        text = template
        for key, value in element.items():
            text = text.replace(f"{{{{ .{key} }}}}", value)
        assert "{{" not in text
        applications.append(json.loads(text))
    check_sweep(applications, plane, tmp_path)
