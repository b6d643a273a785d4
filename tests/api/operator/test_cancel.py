"""A canceled job on a real API server with the real controllers: it ends, is cleaned up, and frees its place."""

import json
from functools import partial
from typing import Any

from tests.support.cluster.nodeless import NAMESPACE, Nodeless, profile_objects
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

HERE = f"--namespace={NAMESPACE}"
PROFILE = {"image": "example.org/qlora-trainer:none", "device": "cpu", "limits": {"jobs": 1}}


def start(cluster: Nodeless, name: str, **spec: Any) -> str:
    scheduling = {"profileName": "one"}
    body = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}}
    cluster.kubectl.apply(json.dumps(body | {"spec": {**MINIMAL["spec"], "scheduling": scheduling, **spec}}))
    return name


def change(cluster: Nodeless, name: str, **spec: Any) -> None:
    cluster.kubectl("patch", "qlorajob", name, HERE, "--type=merge", f"--patch={json.dumps({'spec': spec})}")


def reasons(cluster: Nodeless, name: str) -> dict[str, str]:
    """The reason of each condition."""
    return {entry["type"]: entry["reason"] for entry in cluster.job(name)["status"]["conditions"]}


def waits_for_a_place(cluster: Nodeless, name: str) -> bool:
    return reasons(cluster, name).get("Succeeded") == "JobLimitReached"


def is_cleaned_up(cluster: Nodeless, name: str) -> bool:
    return reasons(cluster, name).get("CleanedUp") == "CleanedUp" and cluster.children(name) == []


def test_a_running_and_a_suspended_job_are_canceled_and_each_frees_its_place(operated: Nodeless) -> None:
    [profile] = profile_objects({"one": PROFILE})
    operated.kubectl.apply(json.dumps(profile))
    running = start(operated, "unwanted")
    operated.succeed(running, "prepare")
    pod = operated.pod(running, "train")
    operated.start_pod(pod)
    operated.wait_for_phase(running, "Training")
    following, last = start(operated, "following"), start(operated, "last")
    for name in (following, last):
        eventually(partial(waits_for_a_place, operated, name), seconds=60, every=0.2, what=f"{name} to wait")

    change(operated, running, cancel=True)

    operated.wait_for_phase(running, "Failed")
    assert reasons(operated, running)["Failed"] == "Cancelled"
    # It frees its place before its pod has stopped, which is asked to, and not cleaned up under.
    operated.succeed(following, "prepare")
    assert f"{running}-clean-1" not in operated.children(running)
    operated.stop_pod(pod, 143)
    operated.succeed_pod(operated.pod(running, "clean"))
    eventually(partial(is_cleaned_up, operated, running), seconds=60, every=0.2, what="the clean-up")

    change(operated, following, suspend=True)
    operated.wait_for_phase(following, "Suspended")
    assert waits_for_a_place(operated, last)
    # A job that waits is canceled too, and is never started.
    change(operated, last, cancel=True)
    operated.wait_for_phase(last, "Failed")
    assert (operated.children(last), operated.job(last)["status"].get("workspace")) == ([], None)
    change(operated, following, cancel=True)
    operated.wait_for_phase(following, "Failed")
    operated.succeed_pod(operated.pod(following, "clean"))
    eventually(partial(is_cleaned_up, operated, following), seconds=60, every=0.2, what="the clean-up")
    other = start(operated, "another")
    operated.succeed(other)
    operated.wait_for_phase(other, "Succeeded")
    # Ended jobs stay, with a new request too.
    change(operated, other, cancel=True)
    change(operated, running, retry={"request": "again"})
    generations = {name: operated.job(name)["metadata"]["generation"] for name in (other, running)}

    def are_seen() -> bool:
        return all(operated.job(name)["status"]["observedGeneration"] == seen for name, seen in generations.items())

    eventually(are_seen, seconds=60, every=0.2, what="both changes")
    assert operated.job(other)["status"]["phase"] == "Succeeded"
    assert reasons(operated, running)["Failed"] == "Cancelled"
