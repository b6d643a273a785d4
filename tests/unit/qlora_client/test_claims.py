"""The pod that reads a claim: as restricted as the job's own, and gone however the reading ends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qlora_client.files.claims import NEEDED, ClaimReader, reading
from qlora_client.files.published import DamagedError
from qlora_client.files.reader_pod import reader_pod, why_not_started
from qlora_client.jobs.job import Job
from qlora_client.kube.channels import CommandError
from qlora_client.kube.cluster import Object
from qlora_client.kube.errors import ClusterError, ForbiddenError, MissingError, RejectedError
from qlora_client.kube.resources import PODS, REVISIONS, Resource

PROFILE: dict[str, Any] = {
    "image": "registry.example.org/qlora-trainer@sha256:1",
    "imagePullSecrets": ["pull"],
    "gpuResource": "nvidia.com/gpu",
    "nodeSelector": {"nvidia.com/gpu.present": "true"},
    "tolerations": [{"key": "team", "operator": "Exists"}],
    "runAs": {"user": 10001, "group": 10002, "fsGroup": 10003},
    "workspace": {"topology": "zonal"},
}


def pod_of(**profile: object) -> Object:
    return reader_pod(JOB, PROFILE | profile, "data", 60)


JOB = Job(
    {
        "metadata": {"name": "demo", "namespace": "team", "uid": "u1"},
        "spec": {"scheduling": {"nodeSelector": {"disk": "fast"}, "tolerations": [{"key": "own"}]}},
        "status": {
            "phase": "Succeeded",
            "currentRevision": "demo-1",
            "workspace": {"claimName": "data", "path": "demo-u1"},
        },
    }
)


def test_the_pod_is_as_restricted_as_those_of_the_job_and_cannot_write_to_the_claim() -> None:
    pod = pod_of()
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert (spec["automountServiceAccountToken"], spec["activeDeadlineSeconds"]) == (False, 60)
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10002,
        "fsGroup": 10003,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [(mount["mountPath"], mount["readOnly"]) for mount in container["volumeMounts"]] == [("/volume", True)]
    assert (container["image"], spec["imagePullSecrets"]) == (PROFILE["image"], [{"name": "pull"}])
    # No step's label: the operator would take it for a pod of the job.
    assert set(pod["metadata"]["labels"]) & {"qlora.dev/job", "qlora.dev/job-uid", "qlora.dev/step"} == {
        "qlora.dev/job"
    }
    assert pod["metadata"]["ownerReferences"][0]["uid"] == "u1"
    assert "controller" not in pod["metadata"]["ownerReferences"][0]


def test_it_runs_on_the_node_of_the_jobs_pods_unless_the_volume_is_shared() -> None:
    spec = pod_of()["spec"]
    assert spec["nodeSelector"] == {"disk": "fast", "nvidia.com/gpu.present": "true"}
    assert [toleration["key"] for toleration in spec["tolerations"]] == ["team", "own", "nvidia.com/gpu"]
    anywhere = pod_of(workspace={"topology": "shared"})["spec"]
    assert not {"nodeSelector", "tolerations"} & set(anywhere)
    assert "runAsUser" not in pod_of(runAs=None)["spec"]["securityContext"]


def running(pod: Object) -> Object:
    state = {"running": {"startedAt": "2026-01-02T03:04:05Z"}}
    return pod | {"status": {"phase": "Running", "containerStatuses": [{"name": "trainer", "state": state}]}}


def waiting(pod: Object, reason: str, message: str = "") -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    return pod | {"status": {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": state}]}}


@dataclass
class Played:
    """A cluster with a pod that goes through these states."""

    states: list[Any] = field(default_factory=lambda: [running])
    denied: Sequence[tuple[str, Resource]] = ()
    rejects: str = ""
    undeletable: bool = False
    events: list[Object] = field(default_factory=list)
    output: Sequence[bytes | Exception] = ()
    namespace: str = "team"
    pods: list[str] = field(default_factory=list)
    commands: list[Sequence[str]] = field(default_factory=list)
    seconds: float = 0.0

    def may(self, verb: str, resource: Resource) -> bool:
        return (verb, resource) not in self.denied

    def create(self, _resource: Resource, body: Object) -> Object:
        if self.rejects:
            raise RejectedError(self.rejects)
        self.pods.append("demo-reader-x")
        return body | {"metadata": {**body["metadata"], "name": "demo-reader-x", "uid": "p1"}}

    def get(self, resource: Resource, name: str) -> Object:
        if resource == REVISIONS:
            return {"data": {"profile": PROFILE}}
        pod = {"metadata": {"name": name, "uid": "p1"}}
        state = self.states[0]
        if len(self.states) > 1:
            self.states.pop(0)
        return dict(state(pod))

    def find(self, _resource: Resource, **_: object) -> list[Object]:
        return self.events

    def delete(self, _resource: Resource, name: str, uid: str) -> None:
        if self.undeletable:
            raise ClusterError("the connection is lost")
        assert uid == "p1"
        self.pods.remove(name)

    def exec(self, _pod: str, _container: str, command: Sequence[str]) -> Iterator[bytes]:
        self.commands.append(command)
        for block in self.output:
            if isinstance(block, Exception):
                raise block
            yield block

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def clock(self) -> float:
        return self.seconds


def opened(cluster: Any, said: list[str] | None = None, of: Job | None = None) -> Any:
    say = (said if said is not None else []).append
    return reading(cluster, of or JOB, "data", say=say, sleep=cluster.sleep, clock=cluster.clock)


def test_the_pod_exists_while_the_body_runs() -> None:
    cluster, said = Played([lambda pod: waiting(pod, "ContainerCreating"), running]), list[str]()
    with opened(cluster, said) as reader:
        assert (reader.pod, cluster.pods) == ("demo-reader-x", ["demo-reader-x"])
    assert cluster.pods == []
    assert said == [
        "reading the claim data through a pod",
        "waiting for the pod demo-reader-x to start (ContainerCreating)",
    ]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143), ValueError()])
def test_it_is_deleted_however_the_body_ends(end: BaseException) -> None:
    cluster = Played()
    with pytest.raises(type(end)), opened(cluster):
        raise end
    assert cluster.pods == []


def test_it_is_deleted_if_it_is_interrupted_before_it_has_started() -> None:
    def interrupt(_pod: Object) -> Object:
        raise KeyboardInterrupt

    cluster = Played([interrupt])
    with pytest.raises(KeyboardInterrupt), opened(cluster):
        pass
    assert cluster.pods == []


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CreateContainerConfigError"])
def test_a_pod_that_cannot_start_is_not_waited_for(reason: str) -> None:
    cluster = Played([lambda pod: waiting(pod, reason, "what the kubelet says")])
    with (
        pytest.raises(ClusterError, match=f"did not start within 0 s: {reason}: what the kubelet says"),
        opened(cluster),
    ):
        pass
    assert cluster.pods == []


def test_a_pod_that_does_not_start_in_time_is_explained_by_its_events() -> None:
    event = {
        "type": "Warning",
        "reason": "FailedAttachVolume",
        "message": "Multi-Attach error for volume",
        "lastTimestamp": "2026-01-02T03:04:05Z",
    }
    cluster = Played([lambda pod: waiting(pod, "ContainerCreating")], events=[event])
    wanted = "within 300 s: ContainerCreating; FailedAttachVolume: Multi-Attach error for volume"
    with pytest.raises(ClusterError, match=wanted), opened(cluster):
        pass
    assert cluster.pods == []


def test_an_unscheduled_pod_is_reported_with_the_schedulers_message() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    assert "Unschedulable: 0/3 nodes" in why_not_started({"status": {"conditions": [condition]}}, [], 300)


def test_missing_rights_are_named_as_rules_and_no_pod_is_created() -> None:
    denied = [("create", kind) for kind in NEEDED]
    with pytest.raises(ForbiddenError) as error, opened(Played(denied=[*denied, ("delete", PODS)])):
        pass
    assert str(error.value).startswith("reading the claim data through a pod takes rights that you lack in")
    assert 'resources: ["pods"], verbs: ["create", "delete"]' in str(error.value)
    assert 'resources: ["pods/exec"], verbs: ["create"]' in str(error.value)


def test_a_rejection_by_the_namespace_is_reported_with_the_reason() -> None:
    cluster = Played(rejects='pods "demo-reader-x" is forbidden: exceeded quota: small')
    with pytest.raises(RejectedError, match=r"team does not admit the pod .*: exceeded quota: small"), opened(cluster):
        pass


def test_a_job_that_has_not_started_has_no_workspace() -> None:
    fresh = Job({"metadata": {"name": "demo", "namespace": "team", "uid": "u1"}, "spec": {}})
    with pytest.raises(ClusterError, match="demo is Pending and has no workspace yet"), opened(Played(), of=fresh):
        pass


def test_a_pod_that_cannot_be_deleted_is_reported_and_hides_no_error() -> None:
    said: list[str] = []
    with pytest.raises(KeyError), opened(Played(undeletable=True), said):
        raise KeyError
    assert said[-1] == "the pod demo-reader-x could not be deleted and ends within the hour: the connection is lost"


def fetched(output: Sequence[bytes | Exception], wanted: Mapping[str, int], into: Path) -> Played:
    cluster: Any = Played(output=output)
    ClaimReader(cluster, "demo-reader-x", "data").fetch("demo-u1/adapter", wanted, into)
    return cluster


def test_a_missing_file_is_distinguished_from_a_failed_command(tmp_path: Path) -> None:
    missing = CommandError("the command in the pod failed: tar: report.html: Cannot stat: No such file or directory")
    with pytest.raises(MissingError, match=r"report.html of pvc://data/demo-u1/adapter cannot be found"):
        fetched([missing], {"report.html": 10}, tmp_path)
    with pytest.raises(CommandError, match="Input/output error"):
        fetched([CommandError("tar: report.html: Read error: Input/output error")], {"report.html": 10}, tmp_path)


def test_an_archive_without_the_wanted_files_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="not what was asked for"):
        fetched([b"x" * 2048], {"report.html": 10}, tmp_path)
    assert list(tmp_path.iterdir()) == []
