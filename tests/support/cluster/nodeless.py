"""A real API server with the real controllers and the operator, without a node."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from devcluster.controlplane import ControlPlane, running
from devcluster.kubectl import Kubectl
from qlora_api.contract import ResultRecord, encode_record
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, SPEC_ANNOTATION, STEP_LABEL
from qlora_api.profile import PROFILE_KIND, PROFILE_PLURAL
from qlora_api.spec.job import API_VERSION
from qlora_api.status import MemoryStatus, StepName
from tests.support.builders import PROFILE
from tests.support.cluster.kubelet import bind, container_status, report_pod, terminated
from tests.support.cluster.operator_process import OperatorProcess, running_operator
from tests.support.cluster.played import ENDED, FOUND, STEPS
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
NAMESPACE, NODE = "team", "played"
SHARED, GPU = "shared", "gpu"
_SHARED_WORKSPACE = {"topology": "shared", "accessMode": "ReadWriteMany"}
URI = "pvc://a/b"


@dataclass(frozen=True)
class Nodeless:
    """The cluster as its users and its nodes use it; jobs are in the namespace `team`."""

    plane: ControlPlane
    operator: OperatorProcess

    @property
    def kubectl(self) -> Kubectl:
        return self.plane.kubectl

    def metrics(self) -> str:
        """The operator's answer to a scrape."""
        return self.operator.get("/metrics", port=self.operator.metrics_port)[1]

    def job(self, name: str) -> dict[str, Any]:
        return self.kubectl.get("qlorajob", name, f"--namespace={NAMESPACE}")

    def wait_for_phase(self, name: str, phase: str) -> dict[str, Any]:
        """The job, once it is in the phase."""

        def reached() -> dict[str, Any] | None:
            job = self.job(name)
            return job if job["status"].get("phase") == phase else None

        return eventually(lambda: reached(), seconds=60, every=0.2, what=f"{name} in {phase}") or {}

    def children(self, name: str, kind: str = "jobs") -> list[str]:
        """The names of the Jobs or pods of the job."""
        listed = self.kubectl.get(kind, f"--namespace={NAMESPACE}", f"--selector={JOB_LABEL}={name}")
        return [item["metadata"]["name"] for item in listed["items"]]

    def pod(self, name: str, step: StepName) -> dict[str, Any]:
        """Wait for a pod of the step that has not ended and is not being deleted."""

        def started() -> list[dict[str, Any]]:
            return [pod for pod in self.live_pods(name, step) if "deletionTimestamp" not in pod["metadata"]]

        return eventually(started, seconds=60, every=0.2, what=f"a pod of the {step} step of {name}")[-1]

    def live_pods(self, name: str, step: StepName) -> list[dict[str, Any]]:
        """The pods of the step that have not ended."""
        selector = f"--selector={JOB_LABEL}={name},{STEP_LABEL}={step}"
        pods: list[dict[str, Any]] = self.kubectl.get("pods", f"--namespace={NAMESPACE}", selector)["items"]
        return [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]

    def wait_for_no_pod(self, name: str, step: StepName) -> None:
        """Wait until the step's first Job is suspended and none of its pods is left."""

        def is_suspended() -> bool:
            job = self.kubectl.get("job", f"{name}-{step}-1", f"--namespace={NAMESPACE}")
            conditions = {each["type"]: each["status"] for each in job["status"].get("conditions", ())}
            return conditions.get("Suspended") == "True" and not self.live_pods(name, step)

        eventually(is_suspended, seconds=60, every=0.2, what=f"no pod of the {step} step of {name}")

    def run(self, name: str, step: StepName) -> None:
        """The pod of the step starts."""
        self._report(self.pod(name, step), "Running", {"running": {"startedAt": ENDED}})

    def succeed(self, name: str, *steps: StepName) -> None:
        """The steps end well, one after the other; all of them by default."""
        for step in steps or STEPS:
            self._end(name, step, 0, "Done", FOUND[step])

    def train(self, name: str, eval_loss: float) -> None:
        """The train step ends well, with that loss on the held-out rows."""
        self._end(name, "train", 0, "Done", FOUND["train"] | {"eval_loss": eval_loss})

    def find_trained(self, name: str) -> None:
        """The prepare step ends well, and has found the finished run."""
        self._end(name, "prepare", 0, "Done", FOUND["train"] | FOUND["prepare"] | {"trained": True})

    def prepare(self, name: str, memory: MemoryStatus) -> None:
        """The prepare step ends well, with that estimate."""
        self._end(name, "prepare", 0, "Done", FOUND["prepare"] | {"memory": memory})

    def fail(self, name: str, step: StepName, code: int, reason: str, message: str) -> None:
        """The step ends with that exit code and record."""
        self._end(name, step, code, reason, {"message": message})

    def pods(self) -> list[dict[str, Any]]:
        """The pods of all jobs, oldest first."""
        listed = self.kubectl.get("pods", f"--namespace={NAMESPACE}", f"--selector={STEP_LABEL}")["items"]
        return sorted(listed, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def start_pod(self, pod: dict[str, Any]) -> None:
        """Bind and start the pod. Once deleted, it stays until it is ended and removed."""
        bind(self.plane, NAMESPACE, pod["metadata"]["name"], NODE)
        self._report(pod, "Running", {"running": {"startedAt": ENDED}})

    def end_pod(self, pod: dict[str, Any], code: int, reason: str, **fields: Any) -> None:
        """The pod ends with that exit code and record."""
        self._end_pod(pod, code, reason, fields)

    def succeed_pod(self, pod: dict[str, Any]) -> None:
        """The pod's step ends well."""
        self._end_pod(pod, 0, "Done", FOUND.get(pod["metadata"]["labels"][STEP_LABEL], {}))

    def stop_pod(self, pod: dict[str, Any], code: int) -> None:
        """Wait until the pod is being deleted, end it with that exit code and remove it."""
        name = pod["metadata"]["name"]

        def is_deleted() -> bool:
            return "deletionTimestamp" in self.kubectl.get("pod", name, f"--namespace={NAMESPACE}")["metadata"]

        if "deletionTimestamp" not in pod["metadata"]:
            eventually(is_deleted, seconds=60, every=0.2, what=f"the deletion of {name}")
        self._report(pod, "Failed", terminated(code, "", ENDED))
        options = ("--grace-period=0", "--force", "--wait=false", "--ignore-not-found")
        self.kubectl("delete", "pod", name, f"--namespace={NAMESPACE}", *options)

    def _end(self, name: str, step: StepName, code: int, reason: str, fields: dict[str, Any]) -> None:
        self._end_pod(self.pod(name, step), code, reason, fields)

    def _end_pod(self, pod: dict[str, Any], code: int, reason: str, fields: dict[str, Any]) -> None:
        labels = pod["metadata"]["labels"]
        # As the trainer reads it: a restored job has another.
        document = json.loads(pod["metadata"].get("annotations", {}).get(SPEC_ANNOTATION, "{}"))
        uid = document["metadata"]["uid"] if document else labels[JOB_UID_LABEL]
        fields = {"job_uid": uid} | fields
        record = ResultRecord(
            pod_uid=pod["metadata"]["uid"],
            step=labels[STEP_LABEL],
            time=ENDED,
            outcome="failed" if code else "succeeded",
            exit_code=code,
            reason=reason,
            **fields,
        )
        self._report(pod, "Failed" if code else "Succeeded", terminated(code, encode_record(record), ENDED))

    def _report(self, pod: dict[str, Any], phase: str, state: dict[str, Any]) -> None:
        name, container = pod["metadata"]["name"], container_status(state)
        report_pod(self.plane, NAMESPACE, name, phase, container, startTime=ENDED)


@contextmanager
def nodeless(folder: Path, **profile: object) -> Iterator[Nodeless]:
    """The cluster with the namespace; `folder` gets the operator's files. `profile`: more of its keys.

    The profile `shared` is the same, for jobs of several nodes; `gpu` is the same with GPUs, and a canary for all jobs.
    """
    with running(controller_manager=True) as plane:
        default = {"image": "example.org/qlora-trainer:none", "device": "cpu", **profile}
        canary = {"image": default["image"], "percent": 100}
        apply_definitions(
            plane,
            default=default,
            shared={**default, "workspace": _SHARED_WORKSPACE},
            gpu={**default, "device": "cuda", "gpuResource": "nvidia.com/gpu", "canary": canary},
        )
        plane.kubectl("create", "namespace", NAMESPACE)
        # Pods of a node that does not exist are taken for disrupted after a while.
        plane.kubectl.apply(json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}))
        # Without a kubelet there are no logs.
        settings = {"progress": {"enabled": False}}
        with running_operator(folder / "operator", plane.kubeconfig, settings) as operator:
            yield Nodeless(plane, operator)


DEFAULT_PROFILE = PROFILE.model_dump(by_alias=True, exclude_defaults=True, mode="json")
CRDS = Path(__file__).parents[3] / "crds"


def apply_definitions(plane: ControlPlane, **profiles: dict[str, Any]) -> None:
    """Return when the API server serves every kind, and has these profiles."""
    for definition in sorted(CRDS.glob("*.yaml")):
        plane.kubectl.apply(definition.read_text())
    for kind in ("qlorajobs", "qlorasweeps", PROFILE_PLURAL):
        eventually(partial(plane.kubectl, "get", kind, "--output=json"), seconds=60, what=kind)
    for profile in profile_objects(profiles):
        plane.kubectl.apply(json.dumps(profile))


def profile_objects(profiles: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The QLoRAProfiles of these names and specs."""
    kind = {"apiVersion": API_VERSION, "kind": PROFILE_KIND}
    return [{**kind, "metadata": {"name": name}, "spec": spec} for name, spec in profiles.items()]
