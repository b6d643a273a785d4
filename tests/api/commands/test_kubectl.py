"""Views through kubectl: several managers of one job, diffs, watches, waits and Events."""

import itertools
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster.errors import ClusterError
from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.manifests import FULL, MINIMAL, Manifest, with_value
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"


def named(name: str, manifest: Manifest = MINIMAL) -> Manifest:
    return manifest | {"metadata": {"name": name, "namespace": NAMESPACE}}


def part(name: str, **content: object) -> Manifest:
    """Apply as a manager that wants these fields only."""
    return {key: MINIMAL[key] for key in ("apiVersion", "kind")} | named(name, dict(content))


def apply(cluster: Nodeless, manifest: Manifest, *flags: str) -> str:
    return cluster.kubectl("apply", *flags, "--filename=-", input_text=json.dumps(manifest))


def apply_as(cluster: Nodeless, manager: str, manifest: Manifest) -> str:
    return apply(cluster, manifest, "--server-side", f"--field-manager={manager}")


def version(cluster: Nodeless, name: str) -> str:
    return str(cluster.job(name)["metadata"]["resourceVersion"])


def test_several_managers_each_keep_their_fields(operated: Nodeless) -> None:
    name = "shared"
    apply_as(operated, "argocd-controller", named(name))
    apply_as(operated, "platform", part(name, spec={"activeDeadlineSeconds": 3600}))
    apply_as(operated, "operations", part(name, spec={"suspend": True}))
    operated.wait_for_phase(name, "Suspended")

    def settled() -> bool:
        before = version(operated, name)
        for manager, manifest in (
            ("argocd-controller", named(name)),
            ("platform", part(name, spec={"activeDeadlineSeconds": 3600})),
            ("operations", part(name, spec={"suspend": True})),
        ):
            apply_as(operated, manager, manifest)
        return version(operated, name) == before

    # The operator may write the status in between, as the pods of a step that had begun end.
    assert eventually(settled, seconds=60, every=0.2, what="an apply of the same that changes nothing")
    job = operated.job(name)
    assert (job["spec"]["activeDeadlineSeconds"], job["spec"]["suspend"]) == (3600, True)
    managed = operated.kubectl.get("qlorajob", name, IN_NAMESPACE, "--show-managed-fields")["metadata"]["managedFields"]
    (own,) = [entry for entry in managed if entry["manager"] == "qlora-operator"]
    assert (own["subresource"], set(own["fieldsV1"])) == ("status", {"f:status"})


def test_a_field_of_another_manager_is_a_conflict_that_names_it(operated: Nodeless) -> None:
    apply_as(operated, "argocd-controller", with_value(named("contested"), "spec.suspend", False))
    with pytest.raises(ClusterError, match=r'conflict with "argocd-controller"[^\n]*\.spec\.suspend'):
        apply_as(operated, "operations", part("contested", spec={"suspend": True}))


def test_a_manager_that_releases_its_field_leaves_the_default(operated: Nodeless) -> None:
    """How a suspension by another manager ends."""
    apply_as(operated, "argocd-controller", named("released"))
    apply_as(operated, "operations", part("released", spec={"suspend": True}))
    operated.wait_for_phase("released", "Suspended")
    apply_as(operated, "operations", part("released"))
    assert operated.job("released")["spec"]["suspend"] is False
    operated.wait_for_phase("released", "Preparing")


@pytest.mark.parametrize("flags", [(), ("--server-side",)], ids=["client-side", "server-side"])
@pytest.mark.parametrize("manifest", [MINIMAL, FULL], ids=["minimal", "full"])
def test_after_an_apply_the_diff_is_empty_and_the_same_apply_changes_nothing(
    operated: Nodeless, manifest: Manifest, flags: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    name = f"applied-{'full' if manifest is FULL else 'minimal'}-{len(flags)}"
    apply(operated, named(name, manifest), *flags)
    eventually(lambda: operated.job(name)["status"].get("phase"), seconds=60, what="the operator's first status")

    def settled() -> bool:
        before = version(operated, name)
        assert operated.kubectl("diff", *flags, "--filename=-", input_text=json.dumps(named(name, manifest))) == ""
        apply(operated, named(name, manifest), *flags)
        return version(operated, name) == before

    # The operator may write in between, once or twice: until then the versions differ for its sake.
    assert eventually(settled, seconds=60, every=0.2, what="an apply that changes nothing")


def test_a_job_that_was_exported_with_its_status_is_applied_again_without_a_change(operated: Nodeless) -> None:
    apply(operated, with_value(named("exported"), "spec.suspend", True))
    exported = operated.wait_for_phase("exported", "Suspended")
    assert operated.kubectl("diff", "--filename=-", input_text=json.dumps(exported)) == ""
    apply(operated, exported)
    applied = operated.job("exported")
    assert (applied["spec"], applied["status"]) == (exported["spec"], exported["status"])


@contextmanager
def watching(cluster: Nodeless, output: Path, *arguments: str) -> Iterator[None]:
    """`kubectl get --watch` in the background, which writes to the file."""
    kubectl = cluster.kubectl
    command: list[str | Path] = [kubectl.program, "--kubeconfig", kubectl.kubeconfig, "get", "--watch", *arguments]
    with output.open("w") as lines:
        watch = subprocess.Popen([*command, IN_NAMESPACE], stdout=lines)
        try:
            yield
        finally:
            watch.terminate()
            watch.wait(timeout=30)


@pytest.fixture(scope="module")
def lives(operated: Nodeless, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """One job succeeds and one fails; the rows of a wide watch over both, as words."""
    output = tmp_path_factory.mktemp("watch") / "rows"
    apply(operated, named("good"))
    apply(operated, named("bad"))
    with watching(operated, output, "qlorajobs", "--output=wide"):
        first = ("\ngood ", "\nbad ")
        eventually(lambda: all(row in output.read_text() for row in first), seconds=60, what="the first rows of both")
        operated.run("good", "prepare")
        operated.succeed("good", "prepare")
        operated.run("good", "train")
        operated.wait_for_phase("good", "Training")
        operated.succeed("good", "train", "publish")
        operated.fail("bad", "prepare", 11, "BadDataset", "train.jsonl, row 3: no field 'messages'; add it")
        operated.wait_for_phase("good", "Succeeded")
        operated.wait_for_phase("bad", "Failed")
        ends = ("BadDataset", "pvc://a/b")
        eventually(lambda: all(end in output.read_text() for end in ends), seconds=60, what="the rows of both ends")
    return [line.split() for line in output.read_text().splitlines()]


def test_a_watch_shows_each_phase_in_order_and_the_end_with_its_address_or_reason(lives: list[list[str]]) -> None:
    header, *rows = lives
    columns = "NAME PHASE PROGRESS LOSS REMAINING MODEL ADAPTER GPU-HOURS PROFILE GPUS QUEUE REASON AGE"
    assert header == columns.split()
    good = [row[1:-1] for row in rows if row[0] == "good"]
    model = "hf://org/model"
    # Until the operator has seen it, a job has no phase; a phase has another row when something else changes.
    assert [phase for phase, _ in itertools.groupby(row[0] for row in good if row != [model, "default", "1"])] == [
        "Preparing",
        "Queued",
        "Training",
        "Publishing",
        "Succeeded",
    ]
    assert good[-1] == ["Succeeded", "100%", "10/10", "1.25", model, "pvc://a/b", "default", "1", "Succeeded"]
    assert [row[1:-1] for row in rows if row[0] == "bad"][-1] == ["Failed", model, "default", "1", "BadDataset"]


@pytest.mark.usefixtures("lives")
def test_waits_end_on_the_condition_and_on_any_end_of_the_job(operated: Nodeless) -> None:
    for name, kind in (("good", "Succeeded"), ("bad", "Failed")):
        for target in (f"condition={kind}", "jsonpath={.status.completionTime}"):
            said = operated.kubectl("wait", f"--for={target}", f"qlorajob/{name}", IN_NAMESPACE, "--timeout=30s")
            assert said == f"qlorajob.qlora.dev/{name} condition met\n"
    with pytest.raises(ClusterError, match="timed out waiting for the condition on qlorajobs/bad"):
        operated.kubectl("wait", "--for=condition=Succeeded", "qlorajob/bad", IN_NAMESPACE, "--timeout=1s")


@pytest.mark.usefixtures("lives")
def test_events_of_a_job_list_its_phases_in_order(operated: Nodeless) -> None:
    def rows(name: str, last: str) -> list[str]:
        """The Events, once the last one is stored, which is after the status."""

        def found() -> list[str] | None:
            said = operated.kubectl("events", f"--for=qlorajob/{name}", IN_NAMESPACE, "--no-headers")
            return said.splitlines() if last in said else None

        return eventually(found, seconds=60, every=0.2, what=f"the Event {last} of {name}") or []

    phases = ("Preparing", "Queued", "Training", "Publishing", "Succeeded")
    good, bad = rows("good", "Succeeded"), rows("bad", "BadDataset")
    assert [row.split()[1:3] for row in good] == [["Normal", phase] for phase in phases]
    assert [row.split()[1:3] for row in bad] == [["Normal", "Preparing"], ["Warning", "BadDataset"]]
    assert bad[-1].endswith("train.jsonl, row 3: no field 'messages'; add it")
