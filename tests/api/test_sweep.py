"""The life of a sweep on a real API server and controllers, without a node."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from devcluster.errors import ClusterError
from tests.support.cluster.nodeless import NAMESPACE, SHARED, Nodeless
from tests.support.sweeps import SWEEP, TEMPLATE
from tests.support.waiting import eventually

Object = dict[str, Any]


class Sweeps:
    """Sweeps of the namespace, as their users see them."""

    def __init__(self, cluster: Nodeless) -> None:
        self.cluster = cluster

    def create(self, name: str, template: Object | None = None, labels: Object | None = None, **spec: Any) -> Object:
        metadata = {"name": name, "namespace": NAMESPACE, "labels": labels or {}}
        content = SWEEP["spec"] | {"template": {"spec": TEMPLATE | (template or {})}} | spec
        created = self.cluster.kubectl(
            "create",
            "--output=json",
            "--filename=-",
            input_text=json.dumps(SWEEP | {"metadata": metadata, "spec": content}),
        )
        return dict(json.loads(created))

    def get(self, name: str) -> Object:
        return self.cluster.kubectl.get("qlorasweep", name, f"--namespace={NAMESPACE}")

    def patch(self, name: str, **spec: Any) -> None:
        change = json.dumps({"spec": spec})
        self.cluster.kubectl(
            "patch", "qlorasweep", name, f"--namespace={NAMESPACE}", "--type=merge", f"--patch={change}"
        )

    def wait(self, name: str, **status: Any) -> Object:
        """The sweep, once its status has these fields."""

        def reached() -> Object | None:
            sweep = self.get(name)
            return sweep if status.items() <= sweep["status"].items() else None

        return eventually(reached, seconds=60, every=0.2, what=f"{name} with {status}") or {}

    def cells(self, name: str) -> list[str]:
        selector = f"--selector=qlora.dev/sweep={name}"
        listed = self.cluster.kubectl.get("qlorajobs", f"--namespace={NAMESPACE}", selector)
        return sorted(item["metadata"]["name"] for item in listed["items"])

    def wait_for_cells(self, name: str, count: int) -> list[str]:
        wanted = [f"{name}-{number:02}" for number in range(count)]
        eventually(lambda: self.cells(name) == wanted, seconds=60, every=0.2, what=f"{count} cells of {name}")
        return wanted

    def succeed(self, cell: str, eval_loss: float) -> None:
        self.cluster.succeed(cell, "prepare")
        self.cluster.train(cell, eval_loss)
        self.cluster.succeed(cell, "publish")


@pytest.fixture
def sweeps(operated: Nodeless) -> Iterator[Sweeps]:
    yield Sweeps(operated)
    operated.kubectl("delete", "qlorasweeps,qlorajobs", "--all", f"--namespace={NAMESPACE}")


def reason(sweep: Object) -> str:
    (found,) = [entry["reason"] for entry in sweep["status"]["conditions"] if entry["type"] == "Succeeded"]
    return str(found)


def test_a_sweep_runs_its_cells_and_its_best_adapter_outlives_it(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    template = {"scheduling": {"profileName": SHARED}, "workspace": {"size": "3Gi"}}
    sweeps.create("life", template, grid={"rank": [8, 16, 32]}, parallelism=2)
    first, second = sweeps.wait_for_cells("life", 2)
    sweeps.wait("life", phase="Running", running=2, pending=1, summary="0/3")

    # A cell is a plain job on the claim of all, which has no owner.
    claim = sweeps.get("life")["status"]["claimName"]
    assert cluster.job(first)["spec"]["workspace"] == {"claimName": claim}
    stored = cluster.kubectl.get("persistentvolumeclaim", claim, f"--namespace={NAMESPACE}")
    assert stored["spec"]["resources"]["requests"]["storage"] == "3Gi"
    assert "ownerReferences" not in stored["metadata"]
    # Its pods find there what the other cells have downloaded and quantized.
    container = cluster.pod(first, "prepare")["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["QLORA_MODEL_CACHE"] == f"/workspace/{claim}.sweep"

    sweeps.succeed(first, 1.5)
    cluster.fail(second, "prepare", 11, "BadDataset", "row 3 is empty")
    third = sweeps.wait_for_cells("life", 3)[2]
    running = sweeps.wait("life", succeeded=1, failed=1, running=1)["status"]
    assert (running["best"]["cell"], running["best"]["evalLoss"]) == (first, 1.5)
    sweeps.succeed(third, 1.25)

    status = sweeps.wait("life", phase="Succeeded", summary="3/3")["status"]
    assert (status["best"]["cell"], status["best"]["overrides"]) == (third, "rank=32")
    assert [(cell["phase"], cell.get("rank"), cell["reason"]) for cell in status["cells"]] == [
        ("Succeeded", 2, ""),
        ("Failed", None, "BadDataset"),
        ("Succeeded", 1, ""),
    ]
    table = cluster.kubectl("get", "qs", "life", f"--namespace={NAMESPACE}")
    assert ["life", "Succeeded", "3/3", third, "1.25"] == table.splitlines()[1].split()[:5]
    about = "--field-selector=involvedObject.name=life"

    def has_events() -> bool:
        events = cluster.kubectl.get("events", f"--namespace={NAMESPACE}", about)["items"]
        return {"Running", "Succeeded"} <= {event["reason"] for event in events}

    eventually(has_events, seconds=60, every=0.2, what="the Events of the sweep")

    cluster.kubectl("delete", "qlorasweep", "life", f"--namespace={NAMESPACE}")
    eventually(lambda: not sweeps.cells("life"), seconds=60, every=0.2, what="the end of the cells")
    assert cluster.kubectl.get("persistentvolumeclaim", claim, f"--namespace={NAMESPACE}")["metadata"]["name"] == claim


@pytest.mark.slow
def test_the_best_adapter_alone_is_published_by_a_job_that_takes_up_its_run(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    template = {"output": {"destination": "hf://org/adapter"}, "cleanupAfterSeconds": 86_400}
    sweeps.create("chosen", template, grid={"rank": [8, 16]}, publish="best")
    for number, loss in enumerate((1.25, 1.5)):
        cell = sweeps.wait_for_cells("chosen", number + 1)[number]
        assert cluster.job(cell)["spec"]["output"] == {}
        sweeps.succeed(cell, loss)
    eventually(lambda: "chosen-best" in sweeps.cells("chosen"), seconds=60, every=0.2)
    best = cluster.job("chosen-best")["spec"]
    assert (best["continues"], best["output"], best["lora"]["rank"]) == ("chosen-00", template["output"], 8)
    eventually(lambda: reason(sweeps.wait("chosen", phase="Running", summary="2/2")) == "Running", seconds=60)
    cluster.succeed("chosen-best", "prepare")
    cluster.train("chosen-best", 1.25)
    cluster.succeed("chosen-best", "publish")
    status = sweeps.wait("chosen", phase="Succeeded")["status"]
    assert (status["best"]["cell"], status["published"]["cell"]) == ("chosen-00", "chosen-00")
    assert (status["published"]["name"], status["published"]["phase"]) == ("chosen-best", "Succeeded")
    for cell in ("chosen-00", "chosen-01"):
        cleaned = lambda name=cell: cluster.job(name)["spec"].get("cleanupAfterSeconds")  # noqa: E731
        assert eventually(cleaned, seconds=60, every=0.2) == 86_400


def together(sweeps: Sweeps, name: str, count: int, **spec: Any) -> list[str]:
    """The cells of a sweep that one pod is to train, once all are prepared."""
    grid = {"rank": [8, 16, 32, 64][:count]}
    sweeps.create(name, {"scheduling": {"profileName": SHARED}}, grid=grid, **{"cellsPerPod": count} | spec)
    cells = sweeps.wait_for_cells(name, min(count, spec.get("cellsPerPod", count)))
    for cell in cells:
        sweeps.cluster.succeed(cell, "prepare")
    return cells


def pod_of(sweeps: Sweeps, name: str, job: str) -> Object:
    """The pod of that train Job of the sweep, once it exists."""
    selector = f"--selector=qlora.dev/sweep={name},qlora.dev/step=train"

    def found() -> list[Object]:
        pods = sweeps.cluster.kubectl.get("pods", f"--namespace={NAMESPACE}", selector)["items"]
        return [pod for pod in pods if pod["metadata"]["name"].startswith(f"{job}-")]

    return eventually(found, seconds=60, every=0.2, what=f"a pod of {job}")[-1]


def end_together(sweeps: Sweeps, pod: Object, first: str) -> None:
    """The pod has trained all its cells; its record has the UID of the first."""
    uid = sweeps.cluster.job(first)["metadata"]["uid"]
    sweeps.cluster.end_pod(pod, 0, "Done", job_uid=uid, training_step=10, total_steps=10)


@pytest.mark.slow
def test_one_pod_trains_as_many_cells_as_requested_and_the_next_the_rest(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    first, second = together(sweeps, "pods", 3, cellsPerPod=2)
    pod = pod_of(sweeps, "pods", "pods-p00-train-1")
    train = cluster.kubectl.get("job", "pods-p00-train-1", f"--namespace={NAMESPACE}")
    (owner,) = train["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("QLoRASweep", "pods", True)
    arguments = train["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"/etc/qlora/with/{second}.json" in arguments
    assert sweeps.cells("pods") == [first, second]
    cluster.start_pod(pod)
    for cell in (first, second):
        cluster.wait_for_phase(cell, "Training")
        assert cluster.children(cell) == [f"{cell}-prepare-1"]
    end_together(sweeps, pod, first)
    for cell, loss in ((first, 1.5), (second, 1.25)):
        cluster.train(cell, loss)
        assert (
            "--with"
            not in cluster.kubectl.get("job", f"{cell}-train-1", f"--namespace={NAMESPACE}")["spec"]["template"][
                "spec"
            ]["containers"][0]["args"]
        )
        cluster.succeed(cell, "publish")
    third = sweeps.wait_for_cells("pods", 3)[2]
    sweeps.succeed(third, 1.75)
    assert sweeps.wait("pods", phase="Succeeded")["status"]["best"]["cell"] == second


@pytest.mark.slow
def test_a_cell_that_is_deleted_or_suspended_does_not_stop_the_others(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    first, second, third = together(sweeps, "left", 3)
    pod = pod_of(sweeps, "left", "left-p00-train-1")
    cluster.start_pod(pod)
    cluster.wait_for_phase(second, "Training")
    cluster.kubectl("delete", "qlorajob", first, f"--namespace={NAMESPACE}")
    eventually(
        lambda: sweeps.get("left")["status"]["cells"][0]["phase"] == "Deleted", seconds=60, every=0.2, what="its end"
    )
    assert cluster.job(second)["status"]["phase"] == "Training"
    assert "deletionTimestamp" not in pod_of(sweeps, "left", "left-p00-train-1")["metadata"]
    # Once that pod is lost, the next trains the other two.
    cluster.kubectl("delete", "pod", pod["metadata"]["name"], f"--namespace={NAMESPACE}", "--wait=false")
    cluster.stop_pod(pod, 143)
    pod = pod_of(sweeps, "left", "left-p00-train-2")
    arguments = pod["spec"]["containers"][0]["args"]
    assert f"/etc/qlora/with/{third}.json" in arguments
    assert arguments.count("--with") == 1
    cluster.start_pod(pod)
    cluster.wait_for_phase(third, "Training")
    end_together(sweeps, pod, second)
    for cell in (second, third):
        cluster.train(cell, 1.5)
        cluster.succeed(cell, "publish")
    sweeps.wait("left", phase="Succeeded", succeeded=2, failed=1)


@pytest.mark.slow
def test_a_suspended_sweep_stops_the_pod_of_its_cells_and_goes_on_with_the_next(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    first, second = together(sweeps, "held", 2)
    pod = pod_of(sweeps, "held", "held-p00-train-1")
    cluster.start_pod(pod)
    cluster.wait_for_phase(first, "Training")
    sweeps.patch("held", suspend=True)
    cluster.stop_pod(pod, 143)
    sweeps.wait("held", phase="Suspended")
    for cell in (first, second):
        cluster.wait_for_phase(cell, "Suspended")
    sweeps.patch("held", suspend=False)
    pod = pod_of(sweeps, "held", "held-p00-train-2")
    assert pod["spec"]["containers"][0]["args"].count("--with") == 1


def test_a_suspended_sweep_suspends_its_cells_and_goes_on_later(sweeps: Sweeps) -> None:
    sweeps.create("pause", labels={"kueue.x-k8s.io/queue-name": "gpus"})
    (first,) = sweeps.wait_for_cells("pause", 1)
    assert sweeps.cluster.job(first)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    sweeps.patch("pause", suspend=True)
    eventually(lambda: sweeps.cluster.job(first)["spec"]["suspend"], seconds=60, every=0.2)
    sweeps.patch("pause", suspend=False)
    eventually(lambda: not sweeps.cluster.job(first)["spec"]["suspend"], seconds=60, every=0.2)
    assert sweeps.cells("pause") == [first]


def test_a_cell_that_cannot_be_created_keeps_the_sweep_waiting_with_the_reason(sweeps: Sweeps) -> None:
    cluster = sweeps.cluster
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "jobs", "namespace": NAMESPACE}}
    cluster.kubectl.apply(json.dumps(quota | {"spec": {"hard": {"count/qlorajobs.qlora.dev": "0"}}}))
    try:
        where = (f"--namespace={NAMESPACE}", "jobs")
        eventually(lambda: cluster.kubectl.get("resourcequota", *where)["status"].get("hard"), seconds=60)
        sweeps.create("denied")
        eventually(lambda: reason(sweeps.wait("denied", phase="Pending")) == "CellRejected", seconds=60, every=0.2)
        assert sweeps.cells("denied") == []
    finally:
        cluster.kubectl("delete", "resourcequota", "jobs", f"--namespace={NAMESPACE}")


def test_a_job_of_the_name_of_a_cell_is_left_alone(sweeps: Sweeps) -> None:
    metadata = {"name": "taken-00", "namespace": NAMESPACE}
    job = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": metadata, "spec": TEMPLATE}
    sweeps.cluster.kubectl("create", "--filename=-", input_text=json.dumps(job))
    sweeps.create("taken")
    eventually(lambda: reason(sweeps.wait("taken", phase="Pending")) == "NameTaken", seconds=60, every=0.2)
    assert "ownerReferences" not in sweeps.cluster.job("taken-00")["metadata"]


def test_cells_that_cannot_share_a_workspace_wait_until_one_runs_at_a_time(sweeps: Sweeps) -> None:
    sweeps.create("apart", parallelism=2)
    eventually(lambda: reason(sweeps.wait("apart", phase="Pending")) == "WorkspaceNotShared", seconds=60, every=0.2)
    assert "WorkspaceNotShared" in sweeps.cluster.kubectl("get", "qlorasweeps", f"--namespace={NAMESPACE}")
    sweeps.patch("apart", parallelism=1)
    sweeps.wait_for_cells("apart", 1)


def test_a_cell_cannot_be_changed_by_its_users_more_than_any_job(sweeps: Sweeps) -> None:
    sweeps.create("plain")
    (cell,) = sweeps.wait_for_cells("plain", 1)
    with pytest.raises(ClusterError, match=r"spec\.lora cannot be changed once the job exists"):
        sweeps.cluster.kubectl(
            "patch",
            "qlorajob",
            cell,
            f"--namespace={NAMESPACE}",
            "--type=merge",
            '--patch={"spec":{"lora":{"rank":3}}}',
        )
