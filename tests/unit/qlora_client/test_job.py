"""A job's JSON, read by name."""

from typing import Any

import pytest

from qlora_api.naming import CELLS_IN_POD_ANNOTATION
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import Pod


def job(spec: dict[str, Any] | None = None, **status: Any) -> Job:
    metadata = {"name": "a", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-02T03:04:05Z"}
    return Job({"metadata": metadata, "spec": spec or {}, "status": status})


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({}, 0),
        ({"phase": "Succeeded", "lastFailure": {"exitCode": 200}}, 0),
        ({"phase": "Failed", "lastFailure": {"exitCode": 14}}, 14),
        ({"phase": "Failed", "lastFailure": {"reason": "DeadlineExceeded"}}, 1),
        ({"phase": "Failed"}, 1),
    ],
)
def test_the_exit_code_is_that_of_the_step_that_failed(status: dict[str, Any], code: int) -> None:
    assert job(**status).exit_code == code


def test_gpu_hours_appear_once_the_operator_reports_them() -> None:
    assert job().gpu_hours is None
    assert job(usage={"gpuSeconds": 5400}).gpu_hours == 1.5
    assert job(usage={"gpuSeconds": 0}).gpu_hours == 0


def test_a_cell_is_trained_by_its_sweep_with_others_if_that_says_so() -> None:
    owner = {"kind": "QLoRASweep", "name": "rates", "uid": "v", "controller": True}
    metadata = {**job().body["metadata"], "ownerReferences": [owner]}
    assert Job({"metadata": metadata}).sweep_uid == ""
    assert Job({"metadata": metadata | {"annotations": {CELLS_IN_POD_ANNOTATION: "4"}}}).sweep_uid == "v"


@pytest.mark.parametrize(
    ("status", "waits_for", "has_log", "ended"),
    [
        ({}, "", False, False),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"}
                ]
            },
            "Unschedulable: no GPU",
            False,
            False,
        ),
        ({"containerStatuses": [{"name": "mesh", "state": {"running": {}}}]}, "", False, False),
        (
            {
                "containerStatuses": [
                    {"name": "mesh", "state": {"terminated": {}}},
                    {"name": "trainer", "state": {"waiting": {"reason": "ContainerCreating"}}},
                ]
            },
            "ContainerCreating",
            False,
            False,
        ),
        ({"containerStatuses": [{"name": "trainer", "state": {"running": {}}}]}, "", True, False),
        ({"containerStatuses": [{"name": "trainer", "state": {"terminated": {"exitCode": 1}}}]}, "", True, True),
    ],
)
def test_a_pod_has_its_waiting_reason_and_whether_it_has_a_log(
    status: dict[str, Any], waits_for: str, has_log: bool, ended: bool
) -> None:
    pod = Pod({"metadata": {"name": "a"}, "status": status})
    assert (pod.waits_for, pod.has_log, pod.ended) == (waits_for, has_log, ended)
