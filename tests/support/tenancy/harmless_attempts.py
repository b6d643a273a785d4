"""Attempts of a tenant that the API server admits: each shows that the operator does not believe or spread it.

No attempt needs a node. The test checks after each of them that nothing of the victim's has changed.
"""

from collections.abc import Callable
from typing import Any

from qlora_api.contract import ENV_REGISTRIES, ResultRecord, encode_record
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, STEP_LABEL, workspace_claim_name
from qlora_api.status import DatasetStatus, MemoryStatus, StepName
from tests.support.manifests import MINIMAL
from tests.support.tenancy.rejected_attempts import pod
from tests.support.tenancy.tenancy import CAPPED, OPERATOR, TENANT, VICTIM, Object, Tenants, path_of, summary
from tests.support.waiting import eventually

NEEDS_NO_NODE: dict[str, Callable[[Tenants], None]] = {}
TIME = "2026-01-02T03:04:05Z"
SPEC = MINIMAL["spec"]
_PREPARED: dict[str, Any] = {
    "model_revision": "c0ffee",
    "memory": MemoryStatus(estimate_bytes=10, low_bytes=9, high_bytes=11, verdict="unknown"),
    "dataset": DatasetStatus(format="chat", rows=12, used_rows=10),
}


def attempt(function: Callable[[Tenants], None]) -> Callable[[Tenants], None]:
    """Collects it under its name, with blanks."""
    NEEDS_NO_NODE[function.__name__.replace("_", " ")] = function
    return function


def submit(t: Tenants, name: str, namespace: str = TENANT, metadata: Object | None = None, **spec: Any) -> Object:
    """A job of the tenant."""
    body = MINIMAL | {"metadata": {"name": name, **(metadata or {})}, "spec": SPEC | spec}
    return t.tenant.create(namespace, "qlorajobs", body)


def running(t: Tenants, name: str, **spec: Any) -> tuple[Object, Object]:
    """A job of the tenant, and its first pod."""
    return submit(t, name, **spec), t.wait_for_pod(name, "prepare")


def result(job: Object, pod: Object, **changes: Any) -> str:
    """Files of a prepare step that has succeeded, with the given changes."""
    good: dict[str, Any] = {
        "job_uid": job["metadata"]["uid"],
        "pod_uid": pod["metadata"]["uid"],
        "step": "prepare",
        "time": TIME,
        "outcome": "succeeded",
        "exit_code": 0,
        "reason": "Done",
    }
    return encode_record(ResultRecord.model_validate(good | _PREPARED | changes))


def forged(name: str, job: Object, step: StepName, **metadata: Any) -> Object:
    """Labels of the operator's objects for a job, on another object."""
    labels = {JOB_LABEL: job["metadata"]["name"], JOB_UID_LABEL: job["metadata"]["uid"], STEP_LABEL: step}
    return {"name": name, "labels": labels, **metadata}


def controller(owner: Object, api_version: str, kind: str) -> list[Object]:
    """The reference of an object to its claimed controller."""
    metadata = owner["metadata"]
    entry = {"apiVersion": api_version, "kind": kind, "name": metadata["name"], "uid": metadata["uid"]}
    return [entry | {"controller": True}]


def batch_job(metadata: Object) -> Object:
    """A Job that the tenant makes."""
    spec = {"template": {"spec": pod(restartPolicy="Never")["spec"]}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def victims_job(t: Tenants) -> Object:
    return t.job("tune", VICTIM)


def allowed(t: Tenants, verb: str, resource: str, name: str, group: str = "") -> bool:
    attributes = {"verb": verb, "resource": resource, "name": name, "group": group}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = t.tenant.must("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


@attempt
def act_as_the_operator(t: Tenants) -> None:
    assert not allowed(t, "impersonate", "users", OPERATOR)
    assert not allowed(t, "impersonate", "groups", "system:masters")
    assert not allowed(t, "escalate", "clusterroles", "qlora-operator", "rbac.authorization.k8s.io")


@attempt
def a_status_in_a_new_manifest(t: Tenants) -> None:
    status = {"phase": "Succeeded", "adapter": {"uri": "s3://mallory/adapter"}, "observedGeneration": 1}
    t.tenant.create(TENANT, "qlorajobs", MINIMAL | {"metadata": {"name": "forged-status"}, "status": status})
    assert "adapter" not in t.wait("forged-status", phase="Preparing")["status"]


@attempt
def a_status_in_a_changed_manifest(t: Tenants) -> None:
    running(t, "patched-status")
    t.wait("patched-status", phase="Preparing")
    t.tenant.patch(TENANT, "qlorajobs", "patched-status", {"status": {"phase": "Failed", "conditions": []}})
    status = t.job("patched-status")["status"]
    assert (status["phase"], status["conditions"] != []) == ("Preparing", True)


@attempt
def the_claim_of_another(t: Tenants) -> None:
    """A name means an object in the tenant's namespace: here, none."""
    _, own = running(t, "foreign-claim", dataset={"source": f"pvc://{VICTIM}/rows"}, workspace={"claimName": "data"})
    claims = {v["persistentVolumeClaim"]["claimName"] for v in own["spec"]["volumes"] if "persistentVolumeClaim" in v}
    assert (own["metadata"]["namespace"], claims) == (TENANT, {VICTIM, "data"})


@attempt
def the_secret_of_another(t: Tenants) -> None:
    model = SPEC["model"] | {"tokenSecretRef": {"name": "hub"}}
    _, own = running(t, "foreign-secret", model=model)
    assert own["metadata"]["namespace"] == TENANT
    assert {s["secret"]["secretName"] for s in own["spec"]["volumes"] if "secret" in s} == {"hub"}


@attempt
def a_pod_with_the_claim_of_another(t: Tenants) -> None:
    """No object can have such a name, so that the pod waits for ever."""
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": f"{VICTIM}/data"}}
    t.tenant.create(TENANT, "pods", pod(volumes=[volume]) | {"metadata": {"name": "foreign-claim"}})
    assert t.tenant.send("GET", path_of(TENANT, "persistentvolumeclaims", f"{VICTIM}/data"))[0] in (403, 404)


@attempt
def a_registry_at_the_address_of_the_metadata_server(t: Tenants) -> None:
    """The trainer connects only to the profile's addresses, which its pod gets."""
    output = {"destination": "oci://169.254.169.254:80/adapter:v1", "secretRef": {"name": "registry"}}
    _, own = running(t, "metadata-server", output=output)
    environment = {entry["name"]: entry.get("value") for entry in own["spec"]["containers"][0]["env"]}
    assert environment[ENV_REGISTRIES] == "registry.example.org"


@attempt
def a_job_that_the_job_of_another_controls(t: Tenants) -> None:
    """No owner exists in the namespace, so the garbage collector deletes the object."""
    owner = controller(victims_job(t), "qlora.dev/v1beta1", "QLoRAJob")
    metadata = forged("tune-train-1", victims_job(t), "train", ownerReferences=owner)
    t.tenant.create(TENANT, "jobs", batch_job(metadata | {"name": "tune-forged-1"}))

    def gone() -> bool:
        return not [one for one in t.admin.list(TENANT, "jobs") if one["metadata"]["name"] == "tune-forged-1"]

    eventually(gone, seconds=30, what="the forged Job deleted")


@attempt
def a_job_that_the_job_of_another_owns(t: Tenants) -> None:
    owner = controller(victims_job(t), "qlora.dev/v1beta1", "QLoRAJob")
    submit(t, "owned", metadata={"ownerReferences": owner}, suspend=True)
    eventually(lambda: t.admin.send("GET", path_of(TENANT, "qlorajobs", "owned"))[0] == 404, seconds=30)


@attempt
def a_job_that_says_it_is_a_step(t: Tenants) -> None:
    """The operator stops it: it is not the Job that it has created."""
    job, _ = running(t, "forged-step")
    t.wait("forged-step", phase="Preparing")
    owner = controller(job, "qlora.dev/v1beta1", "QLoRAJob")
    t.tenant.create(TENANT, "jobs", batch_job(forged("forged-step-publish-1", job, "publish", ownerReferences=owner)))
    eventually(lambda: len(t.admin.list(TENANT, "jobs", f"{JOB_LABEL}=forged-step")) == 1, seconds=30)
    assert t.job("forged-step")["status"]["step"]["name"] == "prepare"


@attempt
def a_job_with_the_name_of_the_next_step(t: Tenants) -> None:
    other = t.tenant.create(TENANT, "jobs", batch_job({"name": "taken-prepare-1"}))
    submit(t, "taken")
    t.wait("taken", reason="NameTaken", phase="Pending")
    kept = t.admin.get(TENANT, "jobs", "taken-prepare-1")
    assert kept["metadata"]["uid"] == other["metadata"]["uid"]
    assert JOB_LABEL not in kept["metadata"].get("labels", {})


@attempt
def a_first_job_that_nobody_watches(t: Tenants) -> None:
    """It has the name and owner of the operator's Job, but no label to find it by."""
    owner = controller(submit(t, "unwatched", suspend=True), "qlora.dev/v1beta1", "QLoRAJob")
    t.tenant.create(TENANT, "jobs", batch_job({"name": "unwatched-prepare-1", "ownerReferences": owner}))
    t.tenant.patch(TENANT, "qlorajobs", "unwatched", {"spec": {"suspend": False}})
    t.wait("unwatched", reason="NameTaken", phase="Pending")
    t.tenant.delete(TENANT, "jobs", "unwatched-prepare-1")
    t.wait_for_pod("unwatched", "prepare")


@attempt
def a_claim_with_the_name_of_the_workspace(t: Tenants) -> None:
    job = submit(t, "taken-claim", suspend=True)
    name = workspace_claim_name("taken-claim", job["metadata"]["uid"])
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
    t.tenant.create(TENANT, "persistentvolumeclaims", body)
    t.tenant.patch(TENANT, "qlorajobs", "taken-claim", {"spec": {"suspend": False}})
    t.wait("taken-claim", reason="ClaimNameTaken", phase="Pending")


@attempt
def the_deletion_of_what_the_operator_has_created(t: Tenants) -> None:
    running(t, "deleted-children")
    for child in t.admin.list(TENANT, "jobs", f"{JOB_LABEL}=deleted-children"):
        t.tenant.delete(TENANT, "jobs", child["metadata"]["name"])
    eventually(lambda: t.job("deleted-children")["status"]["step"]["attempt"] == 2, seconds=30)


@attempt
def a_finalizer_that_never_goes(t: Tenants) -> None:
    running(t, "immortal")
    t.tenant.patch(TENANT, "qlorajobs", "immortal", {"metadata": {"finalizers": ["example.org/never"]}})
    t.tenant.delete(TENANT, "qlorajobs", "immortal")
    submit(t, "after-the-immortal")
    t.wait_for_pod("after-the-immortal", "prepare")


@attempt
def an_event_in_the_name_of_the_operator(t: Tenants) -> None:
    job, _ = running(t, "forged-event")
    t.wait("forged-event", phase="Preparing")
    about = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "namespace": TENANT, "name": "forged-event"}
    body = {
        "metadata": {"name": "forged-event.0"},
        "involvedObject": about | {"uid": job["metadata"]["uid"]},
        "reason": "Succeeded",
        "source": {"component": "qlora-operator"},
        "reportingComponent": "qlora-operator",
    }
    t.tenant.create(TENANT, "events", body)
    # Not the whole status: a scheduler adds why the pod waits.
    status = t.job("forged-event")["status"]
    assert (status["phase"], "adapter" in status) == ("Preparing", False)


@attempt
def every_field_at_its_largest(t: Tenants) -> None:
    """The operator's copies in the status and in a pod's annotation still fit."""
    column = "\U0001f600" * 128
    names = ("messages", "instruction", "input", "output", "prompt", "completion", "conversations", "system", "tools")
    path = "a" * 480
    running(
        t,
        "largest-".ljust(45, "x"),
        model={"source": f"pvc://data/{path}"},
        dataset={
            "source": f"hf://org/{path}",
            "columns": dict.fromkeys((*names, "text"), column),
            "config": column,
            "split": column,
            "eval": {"source": f"hf://org/{path}", "config": column, "split": column},
        },
        lora={"targetModules": [f"{number:03}" + "m" * 125 for number in range(32)]},
        output={"destination": f"pvc://data/{path}", "merged": {"destination": f"pvc://data/b/{path[4:]}"}},
        scheduling={
            "nodeSelector": {f"{'a' * 180}.example/{number:063}": "v" * 63 for number in range(16)},
            "tolerations": [{"key": f"k{number}", "operator": "Exists"} for number in range(16)],
        },
    )


@attempt
def annotations_without_number(t: Tenants) -> None:
    running_metadata = {"annotations": {f"a{number}": "x" * 1000 for number in range(200)}}
    submit(t, "annotations", metadata=running_metadata)
    t.wait_for_pod("annotations", "prepare")


@attempt
def labels_of_a_queue_that_is_none(t: Tenants) -> None:
    submit(t, "queued", metadata={"labels": {"kueue.x-k8s.io/queue-name": "victims-queue"}})
    t.wait_for_pod("queued", "prepare")


@attempt
def suspensions_without_number(t: Tenants) -> None:
    running(t, "flapping")
    for number in range(20):
        t.tenant.patch(TENANT, "qlorajobs", "flapping", {"spec": {"suspend": number % 2 == 0}})
    eventually(lambda: summary(t.job("flapping"))["phase"] in ("Preparing", "Pending"), seconds=30)


@attempt
def a_retry_of_a_job_that_has_not_failed(t: Tenants) -> None:
    running(t, "untiring", retry={"request": "always"})
    t.wait("untiring", phase="Preparing")
    assert t.job("untiring")["status"]["step"]["attempt"] == 1


@attempt
def a_profile_of_another(t: Tenants) -> None:
    submit(t, "foreign-profile", scheduling={"profileName": "private"})
    message = _message(t.wait("foreign-profile", reason="ProfileNotAllowed", phase="Pending"))
    assert VICTIM not in message
    assert t.admin.list(TENANT, "jobs", f"{JOB_LABEL}=foreign-profile") == []


@attempt
def a_profile_that_is_none(t: Tenants) -> None:
    submit(t, "no-profile", scheduling={"profileName": "unlimited"})
    assert "private" not in _message(t.wait("no-profile", reason="ProfileNotFound", phase="Pending"))


@attempt
def more_gpus_than_the_profile_allows(t: Tenants) -> None:
    submit(t, "many-gpus", scheduling={"profileName": "small"}, resources={"gpus": 2})
    t.wait("many-gpus", reason="LimitExceeded", phase="Pending")


@attempt
def a_larger_workspace_than_the_profile_allows(t: Tenants) -> None:
    submit(t, "large-workspace", scheduling={"profileName": "small"}, workspace={"size": "1Ti"})
    t.wait("large-workspace", reason="LimitExceeded", phase="Pending")
    assert t.admin.list(TENANT, "persistentvolumeclaims", f"{JOB_LABEL}=large-workspace") == []


@attempt
def nodes_that_the_profile_does_not_let_it_choose(t: Tenants) -> None:
    scheduling = {"profileName": "small", "tolerations": [{"operator": "Exists"}]}
    submit(t, "chosen-nodes", scheduling=scheduling)
    t.wait("chosen-nodes", reason="SchedulingNotAllowed", phase="Pending")


@attempt
def more_jobs_at_a_time_than_the_profile_allows(t: Tenants) -> None:
    names = [f"flood-{number}" for number in range(12)]
    for name in names:
        submit(t, name, scheduling={"profileName": "small"})

    def reasons() -> list[object]:
        return [summary(t.job(name))["reason"] for name in names]

    eventually(lambda: reasons().count("JobLimitReached") == 10, seconds=30, what="all but two wait")
    started = [name for name in names if t.job(name)["status"].get("currentRevision")]
    assert len(started) == 2
    for name in started:
        t.tenant.delete(TENANT, "qlorajobs", name)
    rest = [name for name in names if name not in started]

    def next_ones() -> bool:
        return sum(bool(t.job(name)["status"].get("currentRevision")) for name in rest) == 2

    eventually(next_ones, seconds=30, every=0.2, what="the next two")
    t.tenant.must("DELETE", path_of(TENANT, "qlorajobs"))


@attempt
def more_than_the_quota_allows(t: Tenants) -> None:
    for number in range(5):
        submit(t, f"capped-{number}", CAPPED)

    def reasons() -> set[object]:
        return {summary(t.job(f"capped-{number}", CAPPED))["reason"] for number in range(5)}

    eventually(lambda: reasons() & {"ClaimRejected", "JobRejected"}, seconds=30, what="a quota that holds")
    assert len(t.admin.list(CAPPED, "persistentvolumeclaims")) <= 3


def _message(job: Object) -> str:
    return next(str(entry["message"]) for entry in job["status"]["conditions"] if entry["type"] == "Succeeded")
