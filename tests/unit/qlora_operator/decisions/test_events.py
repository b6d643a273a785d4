"""Which Events a job's changes of phase give."""

from dataclasses import replace

from qlora_operator.decisions.events import phase_event
from tests.support.builders import NOW, child, follow, make_job, pod, running, status_in, succeeded


def test_events_of_one_second_have_names_in_their_order() -> None:
    changes = [
        (None, follow(make_job())),
        (follow(make_job()), follow(make_job(status_in("prepare")), child("prepare", created=-5))),
        (
            status_in("prepare", phase="Preparing"),
            follow(make_job(status_in("train")), child("train"), pod("train")),
        ),
        (
            status_in("train", phase="Queued"),
            follow(make_job(status_in("train")), child("train"), running(pod("train"))),
        ),
        (
            status_in("train", phase="Training"),
            follow(make_job(status_in("publish")), child("publish"), running(pod("publish"))),
        ),
        (
            status_in("publish", phase="Publishing"),
            follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish")),
        ),
    ]
    events = [phase_event(make_job(before), after, NOW) for before, after in changes]
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
