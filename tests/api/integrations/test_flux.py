"""The shipped Kustomizations: their expressions in every phase, and in Flux's controller."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.cluster.phases import cases
from tests.support.manifests import MINIMAL, NUMBERS, Manifest, with_value
from tests.support.services.flux import FLUX, Flux, kustomize_controller
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"


def named(name: str) -> Manifest:
    return NUMBERS | {"metadata": {"name": name, "namespace": NAMESPACE}}


def probe(expressions: dict[str, str]) -> dict[str, Any]:
    """Define a kind whose rejections name the expressions that hold for a status."""
    text = {"type": "string", "maxLength": 64}
    condition = {"type": "object", "properties": {"type": text, "status": text}}
    conditions = {"type": "array", "maxItems": 16, "items": condition}
    rules = [
        {"rule": f"!({cel.replace('status.conditions', 'self.status.conditions')})", "message": f"holds: {name}"}
        for name, cel in expressions.items()
    ]
    schema = {
        "type": "object",
        "properties": {"status": {"type": "object", "properties": {"conditions": conditions}}},
        "x-kubernetes-validations": rules,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "probes.test.qlora.dev"},
        "spec": {
            "group": "test.qlora.dev",
            "scope": "Cluster",
            "names": {"kind": "Probe", "plural": "probes", "singular": "probe", "listKind": "ProbeList"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


def holding(plane: ControlPlane, conditions: list[dict[str, Any]]) -> set[str]:
    """The expressions that hold, by the API server's own CEL."""
    body = {"apiVersion": "test.qlora.dev/v1", "kind": "Probe", "metadata": {"name": "probe"}}
    content = json.dumps(body | {"status": {"conditions": conditions}})
    try:
        plane.kubectl("create", "--dry-run=server", "--validate=false", "--filename=-", input_text=content)
    except ClusterError as error:
        if found := set(re.findall(r"holds: (\w+)", str(error))):
            return found
        raise
    return set()


def test_the_expressions_hold_for_a_job_that_has_ended_and_for_no_other(plane: ControlPlane) -> None:
    (check,) = yaml.safe_load((FLUX / "finished.yaml").read_text())["spec"]["healthCheckExprs"]
    assert (check["apiVersion"], check["kind"]) == (MINIMAL["apiVersion"], MINIMAL["kind"])
    plane.kubectl.apply(json.dumps(probe({name: check[name] for name in ("current", "failed")})))
    eventually(lambda: plane.kubectl("get", "probes") or True, seconds=60, what="the probe")
    for case in cases():
        # Flux itself waits until the operator has seen the latest change.
        if case.body["status"]["observedGeneration"] == case.body["metadata"]["generation"]:
            expected = {"Healthy": {"current"}, "Degraded": {"failed"}}.get(case.health, set())
            assert holding(plane, case.body["status"]["conditions"]) == expected, case.name


@pytest.mark.parametrize("file", ["started.yaml", "finished.yaml"])
def test_both_wait_and_prune_and_only_one_has_expressions(file: str) -> None:
    spec = yaml.safe_load((FLUX / file).read_text())["spec"]
    assert (spec["wait"], spec["prune"]) == (True, True)
    assert ("healthCheckExprs" in spec) == (file == "finished.yaml")


@pytest.fixture(scope="module")
def flux(operated: Nodeless, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flux]:
    """With the gate that the page recommends for waiting until the end."""
    folder = tmp_path_factory.mktemp("flux")
    with kustomize_controller(operated.kubectl, folder, "CancelHealthCheckOnNewRevision") as flux:
        yield flux


def started(flux: Flux, cluster: Nodeless, name: str) -> None:
    """A Kustomization of that name with one job, which has started."""
    flux.publish(name, [named(name)])
    flux.deploy(name, "started.yaml")
    flux.wait_for_ready(name, "True", "ReconciliationSucceeded")
    assert cluster.job(name)["status"]["phase"] == "Preparing"


@pytest.mark.slow
def test_waiting_for_started_ends_while_the_job_runs_and_shows_a_later_failure(flux: Flux, operated: Nodeless) -> None:
    started(flux, operated, "flux-started")
    flux.reconcile("flux-started")
    applied = operated.kubectl("events", "--for=kustomization/flux-started", "--namespace=flux-system")
    assert (applied.count("created"), applied.count("configured")) == (1, 0), "the same numbers are no drift"
    operated.fail("flux-started", "prepare", 11, "BadDataset", "no such file")
    operated.wait_for_phase("flux-started", "Failed")
    assert flux.ready("flux-started")[0] == "True", "Flux looks again at its interval only"
    flux.reconcile("flux-started")
    message = flux.wait_for_ready("flux-started", "False", "HealthCheckFailed")
    assert f"failed early due to stalled resources: [QLoRAJob/{NAMESPACE}/flux-started status: 'Failed']" in message


@pytest.mark.slow
def test_waiting_for_finished_ends_when_the_job_has_succeeded(flux: Flux, operated: Nodeless) -> None:
    name = "flux-finished"
    flux.publish(name, [named(name)])
    flux.deploy(name, "finished.yaml")
    operated.succeed(name, "prepare")
    operated.run(name, "train")
    operated.wait_for_phase(name, "Training")
    assert flux.ready(name)[:2] == ("Unknown", "Progressing")
    revision = flux.publish(name, [with_value(named(name), "metadata.labels", {"reviewed": "yes"})])

    def labelled() -> bool:
        return bool(operated.job(name)["metadata"].get("labels", {}).get("reviewed"))

    eventually(labelled, seconds=60, every=0.2, what="a new revision, applied during the wait")
    assert flux.ready(name)[0] != "True"
    operated.succeed(name, "train", "publish")
    flux.wait_for_revision(name, revision)
    flux.wait_for_ready(name, "True", "ReconciliationSucceeded")
    assert operated.job(name)["status"]["phase"] == "Succeeded"


@pytest.mark.slow
def test_waiting_for_finished_ends_immediately_when_the_job_fails(flux: Flux, operated: Nodeless) -> None:
    flux.publish("flux-failed", [named("flux-failed")])
    flux.deploy("flux-failed", "finished.yaml")
    operated.fail("flux-failed", "prepare", 11, "BadDataset", "no such file")
    message = flux.wait_for_ready("flux-failed", "False", "HealthCheckFailed")
    assert "flux-failed status: 'Failed'" in message


@pytest.mark.slow
def test_flux_undoes_a_suspension_by_hand_and_keeps_those_of_other_managers(flux: Flux, operated: Nodeless) -> None:
    name = "flux-suspended"
    started(flux, operated, name)

    def patch(value: bool, *flags: str) -> None:
        change = json.dumps({"spec": {"suspend": value}})
        operated.kubectl("patch", "qlorajob", name, IN_NAMESPACE, "--type=merge", f"--patch={change}", *flags)

    patch(True)
    operated.wait_for_phase(name, "Suspended")
    flux.reconcile(name)
    operated.wait_for_phase(name, "Preparing")
    patch(True, "--field-manager=operations")
    operated.wait_for_phase(name, "Suspended")
    flux.reconcile(name)
    assert operated.job(name)["spec"]["suspend"] is True
    patch(False, "--field-manager=operations")
    operated.wait_for_phase(name, "Preparing")
    revision = flux.publish(name, [with_value(named(name), "spec.suspend", True)])
    operated.wait_for_phase(name, "Suspended")
    flux.wait_for_revision(name, revision)
    flux.wait_for_ready(name, "True", "ReconciliationSucceeded")


@pytest.mark.slow
def test_a_change_of_an_immutable_field_is_reported_and_force_recreates_the_job(flux: Flux, operated: Nodeless) -> None:
    name = "flux-changed"
    started(flux, operated, name)
    before = operated.job(name)
    changed = with_value(named(name), "spec.training.seed", 9)
    other = named("flux-beside")
    flux.publish(name, [changed, other])
    message = flux.wait_for_ready(name, "False", "ReconciliationFailed")
    assert "spec.training cannot be changed once the job exists: delete the QLoRAJob and create it again" in message
    assert operated.job(name) == before
    names = [job["metadata"]["name"] for job in operated.kubectl.get("qlorajobs", IN_NAMESPACE)["items"]]
    assert other["metadata"]["name"] not in names, "nothing of the revision is applied"
    forced = {"kustomize.toolkit.fluxcd.io/force": "enabled"}
    flux.wait_for_revision(name, flux.publish(name, [with_value(changed, "metadata.annotations", forced)]))
    after = operated.wait_for_phase(name, "Preparing")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    assert after["spec"]["training"]["seed"] == 9
    claims = {job["status"]["workspace"]["claimName"] for job in (before, after)}
    assert claims <= set(claims_in(operated))


@pytest.mark.slow
def test_an_object_removed_from_the_source_is_deleted_and_its_claim_stays(flux: Flux, operated: Nodeless) -> None:
    name = "flux-pruned"
    started(flux, operated, name)
    claim = operated.job(name)["status"]["workspace"]["claimName"]
    operated.pod(name, "prepare")
    flux.wait_for_revision(name, flux.publish(name, [named("flux-next")]))

    def gone() -> bool:
        jobs = operated.kubectl.get("qlorajobs", IN_NAMESPACE)["items"]
        left = [*operated.children(name), *operated.children(name, "pods")]
        return name not in {job["metadata"]["name"] for job in jobs} and not left

    assert eventually(gone, seconds=60, every=0.2, what="the end of the job, its Jobs and pods")
    assert claim in claims_in(operated)


def claims_in(cluster: Nodeless) -> list[str]:
    listed = cluster.kubectl.get("persistentvolumeclaims", IN_NAMESPACE)["items"]
    return [claim["metadata"]["name"] for claim in listed if "deletionTimestamp" not in claim["metadata"]]
