"""A job, its logs and its typed form, read by name."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import qlora_api
import qlora_client
from qlora_api.contract import TRAINER_CONTAINER
from qlora_api.naming import CELLS_IN_POD_ANNOTATION
from qlora_api.spec.job import QLoRAJobSpec
from qlora_client.jobs.job import Job
from qlora_client.jobs.logs import _Place
from qlora_client.jobs.pods import CONTAINER, Pod
from qlora_client.kube.cluster import LogEntry


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
    assert job(usage={"gpuHours": "1.50"}).gpu_hours == 1.5
    assert job(usage={"gpuHours": "0.00"}).gpu_hours == 0


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


BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(
    steps=st.lists(st.sampled_from([0, 0, 1, 400_000, 1_000_000, 2_500_000]), max_size=30),
    ends=st.lists(st.integers(0, 30), max_size=4),
)
def test_each_line_comes_once_wherever_the_connection_ends(steps: list[int], ends: list[int]) -> None:
    """`steps`: microseconds between lines. `ends`: lines before each end."""
    time, entries = BEGIN, []
    for number, step in enumerate(steps):
        time += timedelta(microseconds=step)
        entries.append(LogEntry(time, str(number)))
    place, read = _Place(), []
    for end in [*sorted(ends), len(entries)]:
        since = place.time.replace(microsecond=0) if place.time else BEGIN
        read += [entry.text for entry in place.new(each for each in entries[:end] if each.time >= since)]
    assert read == [str(number) for number in range(len(entries))]


def test_the_container_is_that_of_the_contract() -> None:
    assert CONTAINER == TRAINER_CONTAINER


def models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(kind):
        yield from models(part)


@pytest.mark.parametrize("package", [qlora_api, qlora_client])
def test_installed_packages_have_types(package: Any) -> None:
    assert Path(package.__file__).with_name("py.typed").is_file()


def test_a_type_checker_accepts_a_spec_without_its_optional_fields() -> None:
    # By PEP 681 it takes a field for required unless its default is named.
    unnamed = [
        f"{model.__name__}.{ast.unparse(field.target)}"
        for model in set(models(QLoRAJobSpec))
        for field in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(model))))
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call) and field.value.args
    ]
    assert unnamed == []
