"""A restart of the operator is no news: ended, waiting and running jobs are checked again, and nothing is written.

No controllers and no node run here: a Job stays as it was created.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.operator import audit
from devcluster.controlplane import ControlPlane
from tests.support.cluster.operator_process import running_operator
from tests.support.cluster.phases import cases
from tests.support.waiting import eventually

NAMESPACE = "restarted"
SPECS: dict[str, dict[str, Any]] = {
    "ended": {},
    "waits": {"scheduling": {"profileName": "unknown"}},
    "runs": {},
}
PHASES = {"ended": "Succeeded", "waits": "Pending", "runs": "Preparing"}


def phases(plane: ControlPlane) -> dict[str, str]:
    listed = plane.kubectl.get("qlorajobs", f"--namespace={NAMESPACE}")["items"]
    return {job["metadata"]["name"]: job.get("status", {}).get("phase") for job in listed}


def test_a_restart_reconciles_every_job_and_writes_nothing(plane: ControlPlane, tmp_path: Path) -> None:
    plane.kubectl("create", "namespace", NAMESPACE)
    jobs = [
        {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
        }
        for name, spec in SPECS.items()
    ]
    plane.kubectl("create", "--filename=-", input_text=json.dumps({"apiVersion": "v1", "kind": "List", "items": jobs}))
    status = {"status": next(case.body["status"] for case in cases() if case.name == "succeeded")}
    where = ("ended", f"--namespace={NAMESPACE}", "--subresource=status", "--type=merge")
    plane.kubectl("patch", "qlorajob", *where, f"--patch={json.dumps(status)}")
    settings = {"namespaces": [NAMESPACE], "resyncSeconds": 1}
    with running_operator(tmp_path / "first", plane.kubeconfig, settings):
        eventually(lambda: phases(plane) == PHASES, seconds=60, every=0.2, what="the phase of every job")
    before = plane.audit_log.stat().st_size

    with running_operator(tmp_path / "second", plane.kubeconfig, settings) as operator:

        def has_looked_often() -> bool:
            passes = operator.metric('qlora_operator_reconcile_duration_seconds_count{kind="QLoRAJob"}') or 0
            return passes >= 3 * len(SPECS)

        eventually(has_looked_often, seconds=60, every=0.2, what="several passes over every job")

    requests = audit.requests(plane.audit_log, before)
    assert {request.resource for request in requests} >= {"qlorajobs", "jobs", "pods"}
    # The first operator may have ended before its next write of the numbers of jobs, half a minute after the last.
    assert {request.call for request in requests if request.writes} <= {"patch qloraprofiles/status"}
    assert phases(plane) == PHASES
