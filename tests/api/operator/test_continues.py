"""Continuing another job's run, on a real API server with the real operator and no node."""

import json
from typing import Any

from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually


def create(cluster: Nodeless, name: str, **spec: Any) -> None:
    manifest = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": {**MINIMAL["spec"], **spec}}
    cluster.kubectl.apply(json.dumps(manifest))


def reason(cluster: Nodeless, name: str) -> str:
    conditions = cluster.job(name)["status"].get("conditions", ())
    return next((str(each["reason"]) for each in conditions if each["type"] == "Succeeded"), "")


def message(cluster: Nodeless, name: str) -> str:
    conditions = cluster.job(name)["status"].get("conditions", ())
    return next((str(each["message"]) for each in conditions if each["type"] == "Succeeded"), "")


def test_it_starts_when_the_other_job_has_ended_and_then_no_longer_needs_it(operated: Nodeless) -> None:
    create(operated, "taken-up", continues="broken")
    eventually(lambda: reason(operated, "taken-up") == "ContinuedJobNotFound", seconds=60, every=0.2)
    create(operated, "broken")
    operated.succeed("broken", "prepare")
    operated.fail("broken", "train", 14, "Diverged", "training diverged at step 4")
    status = operated.wait_for_phase("broken", "Failed")["status"]

    job = operated.wait_for_phase("taken-up", "Preparing")
    where = (job["status"]["currentRevision"], f"--namespace={NAMESPACE}")
    continued = operated.kubectl.get("controllerrevision", *where)["data"]["continued"]
    assert continued == {
        "job": "broken",
        "uid": operated.job("broken")["metadata"]["uid"],
        "claimName": status["workspace"]["claimName"],
        "workspacePath": status["workspace"]["path"],
    }
    prepare = operated.kubectl.get("job", "taken-up-prepare-1", f"--namespace={NAMESPACE}")
    pod = prepare["spec"]["template"]["spec"]
    (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/continued"]
    assert (mount["subPath"], mount["readOnly"]) == (continued["workspacePath"], True)
    claims = {volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["volumes"]}
    assert claims[mount["name"]] == continued["claimName"]

    operated.kubectl("delete", "qlorajob", "broken", f"--namespace={NAMESPACE}")
    operated.succeed("taken-up")
    operated.wait_for_phase("taken-up", "Succeeded")
