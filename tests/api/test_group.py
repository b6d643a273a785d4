"""Jobs that are trained together, on a real API server with the real operator and no node."""

import json
from typing import Any

import pytest

from qlora_api.memory.estimate import GIB
from qlora_api.status import MemoryStatus
from tests.support.manifests import MINIMAL
from tests.support.nodeless import NAMESPACE, Nodeless
from tests.support.waiting import eventually

GROUPED: dict[str, Any] = {"group": {"name": "rates", "size": 3}, "workspace": {"claimName": "team"}}


def create(cluster: Nodeless, name: str, group: str, **spec: Any) -> None:
    named = {"group": {"name": group, "size": 3}}
    manifest = {
        **MINIMAL,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {**MINIMAL["spec"], **GROUPED, **named, **spec},
    }
    cluster.kubectl.apply(json.dumps(manifest))


def summary(cluster: Nodeless, name: str) -> dict[str, Any]:
    """The condition that explains what the job does."""
    conditions = cluster.job(name).get("status", {}).get("conditions", ())
    return next((each for each in conditions if each["type"] == "Succeeded"), {"reason": "", "message": ""})


def reaches(cluster: Nodeless, name: str, reason: str) -> str:
    """The message, once that is the reason."""
    return str(
        eventually(
            lambda: found["message"] if (found := summary(cluster, name))["reason"] == reason else None,
            seconds=60,
            every=0.2,
            what=f"{name}: {reason}",
        )
    )


def arguments(cluster: Nodeless, child: str) -> list[str]:
    job = cluster.kubectl.get("job", child, f"--namespace={NAMESPACE}")
    return list(job["spec"]["template"]["spec"]["containers"][0]["args"])


def test_one_pod_trains_three_jobs_and_each_ends_with_a_step_of_its_own(operated: Nodeless) -> None:
    create(operated, "rates-c", "rates")
    operated.succeed("rates-c", "prepare")
    assert "1 of 3 jobs" in reaches(operated, "rates-c", "WaitingForGroup")
    create(operated, "rates-x", "rates", workspace={"claimName": "other"})
    assert "spec.workspace.claimName is other" in reaches(operated, "rates-x", "GroupMismatch")
    assert operated.children("rates-x") == []
    for name in ("rates-b", "rates-a"):
        create(operated, name, "rates")
        operated.succeed(name, "prepare")
    operated.run("rates-a", "train")
    assert operated.wait_for_phase("rates-b", "Training")["status"]["group"]["leader"] == "rates-a"
    assert "QLoRAJob rates-a" in reaches(operated, "rates-c", "Training")
    given = arguments(operated, "rates-a-train-1")
    assert [each for each in given if each.startswith("/etc/qlora/with/")] == [
        "/etc/qlora/with/rates-b.json",
        "/etc/qlora/with/rates-c.json",
    ]
    assert operated.children("rates-b") == ["rates-b-prepare-1"]

    operated.succeed("rates-a", "train", "publish")
    for name in ("rates-a", "rates-b", "rates-c"):
        if name != "rates-a":
            operated.succeed(name, "train", "publish")
            assert "--with" not in arguments(operated, f"{name}-train-1")
        operated.wait_for_phase(name, "Succeeded")
    operated.kubectl("delete", "qlorajob", "rates-x", f"--namespace={NAMESPACE}")


@pytest.mark.slow
def test_when_the_leader_is_deleted_the_others_wait_for_its_pod_and_go_on(operated: Nodeless) -> None:
    for name in ("lost-a", "lost-b", "lost-c"):
        create(operated, name, "lost")
    for name in ("lost-a", "lost-b", "lost-c"):
        operated.succeed(name, "prepare")
    operated.run("lost-a", "train")
    operated.wait_for_phase("lost-b", "Training")
    (pod,) = [pod for pod in operated.pods() if pod["metadata"]["name"].startswith("lost-a-train")]
    operated.start_pod(pod)
    operated.kubectl("delete", "qlorajob", "lost-a", f"--namespace={NAMESPACE}")
    assert pod["metadata"]["name"] in reaches(operated, "lost-b", "WaitingForPod")
    assert operated.children("lost-b") == ["lost-b-prepare-1"]
    operated.stop_pod(pod, 143)
    operated.run("lost-b", "train")
    assert "lost-a no longer trains this job" in reaches(operated, "lost-b", "Training")


def test_jobs_that_do_not_fit_the_gpu_together_end_before_one_is_asked_for(operated: Nodeless) -> None:
    names = ("large-a", "large-b", "large-c")
    memory = MemoryStatus(
        estimate_bytes=18 * GIB, low_bytes=14 * GIB, high_bytes=23 * GIB, shared_bytes=5 * GIB, verdict="tight"
    )
    for name in names:
        create(operated, name, "large", resources={"gpuMemory": 24})
        operated.prepare(name, memory)
    for name in names:
        message = reaches(operated, name, "DoesNotFit")
        assert "the 3 jobs of group 'large' need about 44.0 GiB of GPU memory" in message
        assert operated.children(name) == [f"{name}-prepare-1"]
    retry = f"--patch={json.dumps({'spec': {'retry': {'request': 1}}})}"
    operated.kubectl("patch", "qlorajob", "large-b", f"--namespace={NAMESPACE}", "--type=merge", retry)
    operated.run("large-b", "train")
    operated.wait_for_phase("large-b", "Training")
    assert "--with" not in arguments(operated, "large-b-train-2")
