"""Which Events a job's changes of phase give."""

import itertools
from dataclasses import replace
from typing import Any

from qlora_api.status import StepName
from qlora_operator.decisions.events import phase_event
from tests.support.builders import (
    NOW,
    UID,
    after,
    child,
    failed,
    follow,
    make_job,
    pod,
    present,
    running,
    status_in,
    succeeded,
)


def test_events_of_one_second_have_names_in_their_order() -> None:
    seen: list[tuple[StepName, list[dict[str, Any]]]] = [
        ("prepare", [child("prepare", created=-5)]),
        ("train", [child("train"), pod("train")]),
        ("train", [child("train"), running(pod("train"))]),
        ("publish", [child("publish"), running(pod("publish"))]),
        ("publish", [child("publish", Complete=""), succeeded("publish")]),
    ]
    statuses = [None, follow(make_job()), *(follow(make_job(status_in(step)), *bodies) for step, bodies in seen)]
    events = [phase_event(make_job(before), status, NOW) for before, status in itertools.pairwise(statuses) if status]
    by_name = sorted((event for event in events if event), key=lambda event: str(event["metadata"]["name"]))
    assert [event["reason"] for event in by_name] == [
        "Pending",
        "Preparing",
        "Queued",
        "Training",
        "Publishing",
        "Succeeded",
    ]


def test_each_preemption_of_a_job_has_a_separate_event() -> None:
    """A queue changes no count: phases and figures repeat with each preemption."""
    training = make_job(status_in("train", phase="Training"))
    queued = training.status.model_copy(update={"phase": "Queued"})

    def name(version: str) -> object:
        event = phase_event(replace(training, resource_version=version), queued, NOW)
        return event and event["metadata"]["name"]

    assert name("7") == name("7")
    assert name("7") != name("11")


def test_a_change_of_phase_is_an_event_whose_name_is_the_same_after_a_restart() -> None:
    job, bodies = make_job(status_in("train", phase="Queued")), [child("train"), running(pod("train"))]
    event = present(phase_event(job, follow(job, *bodies), NOW))
    assert (event["type"], event["reason"]) == ("Normal", "Training")
    assert (event["involvedObject"]["kind"], event["involvedObject"]["uid"]) == ("QLoRAJob", UID)
    later = present(phase_event(job, follow(job, *bodies, now=after(60)), after(60)))
    assert later["metadata"] == event["metadata"]
    training = follow(job, *bodies)
    assert phase_event(make_job(training), training, NOW) is None


def test_the_event_of_a_failure_is_a_warning_with_the_reason() -> None:
    job = make_job(status_in("prepare", phase="Preparing"))
    ended = [child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", "row 3 is cut")]
    event = present(phase_event(job, follow(job, *ended), NOW))
    assert (event["type"], event["reason"], event["message"]) == ("Warning", "BadDataset", "row 3 is cut")
