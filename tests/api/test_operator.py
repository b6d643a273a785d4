"""The operator's own process against a real API server: many jobs at once, and a kill in the middle of them.

There are no controllers and no node here: a Job stays as it was created.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.addresses import free_port
from devcluster.controlplane import ControlPlane
from tests.support.builders import PROFILE
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
NAMESPACE = "many"
JOBS = 60


@contextmanager
def operator(plane: ControlPlane, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, until the block ends."""
    settings = {
        "profiles": {"default": PROFILE.dump()},
        "namespaces": [NAMESPACE],
        "probePort": free_port(),
        "metricsPort": free_port(),
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "qlora_operator", "--settings", str(folder / "settings.yaml")]
    environment = {**os.environ, "KUBECONFIG": str(plane.kubeconfig), "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def listed(plane: ControlPlane, kind: str) -> list[dict[str, Any]]:
    return list(plane.kubectl.get(kind, f"--namespace={NAMESPACE}")["items"])


@pytest.fixture
def namespace(plane: ControlPlane) -> ControlPlane:
    plane.kubectl("create", "namespace", NAMESPACE)
    return plane


def test_killed_in_the_middle_of_many_jobs_it_starts_each_of_them_once(namespace: ControlPlane, tmp_path: Path) -> None:
    jobs = [
        {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": f"job-{number}", "namespace": NAMESPACE},
            "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}},
        }
        for number in range(JOBS)
    ]
    namespace.kubectl(
        "create", "--filename=-", input_text=json.dumps({"apiVersion": "v1", "kind": "List", "items": jobs})
    )
    with operator(namespace, tmp_path) as process:
        eventually(lambda: listed(namespace, "jobs"), seconds=60, every=0, what="a first Job")
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {job["metadata"]["uid"] for job in listed(namespace, "jobs")}

    def started() -> bool:
        statuses = [job["status"] for job in listed(namespace, "qlorajobs")]
        return [status.get("phase") for status in statuses] == ["Preparing"] * JOBS

    with operator(namespace, tmp_path):
        eventually(started, seconds=60, what="a status of every job")
        created = {
            job["metadata"]["uid"]: job["metadata"]["ownerReferences"][0]["uid"] for job in listed(namespace, "jobs")
        }
        assert before <= created.keys(), "a Job of before the kill was replaced"
        assert len(created) == JOBS
        assert set(created.values()) == {job["metadata"]["uid"] for job in listed(namespace, "qlorajobs")}
        assert {job["status"]["step"]["jobUid"] for job in listed(namespace, "qlorajobs")} == created.keys()

        # From here on only the watches tell it what happens.
        suspend = json.dumps({"spec": {"suspend": True}})
        namespace.kubectl("patch", "qlorajob/job-0", f"--namespace={NAMESPACE}", "--type=merge", f"--patch={suspend}")

        def phase(name: str) -> str:
            job = namespace.kubectl.get("qlorajob", name, f"--namespace={NAMESPACE}")
            return str(job["status"].get("phase"))

        eventually(lambda: phase("job-0") == "Suspended", seconds=30, what="the suspension")
        namespace.kubectl("delete", "job/job-1-prepare-1", f"--namespace={NAMESPACE}")
        second = ("get", "job/job-1-prepare-2", f"--namespace={NAMESPACE}", "--ignore-not-found", "--output=name")
        eventually(lambda: namespace.kubectl(*second), seconds=30, what="the second attempt of a job whose Job is gone")
        assert len(listed(namespace, "jobs")) == JOBS - 1
