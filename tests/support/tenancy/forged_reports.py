"""Attempts of a tenant that act as the node: forged ends, progress and pods of steps.

A container's log and termination message are up to the author of the model.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL
from qlora_api.status import MAX_MESSAGE_LENGTH
from tests.support.builders import ADAPTER
from tests.support.tenancy.harmless_attempts import (
    SPEC,
    TIME,
    controller,
    forged,
    result,
    running,
    submit,
    victims_job,
)
from tests.support.tenancy.rejected_attempts import pod
from tests.support.tenancy.tenancy import TENANT, Object, Tenancy
from tests.support.waiting import eventually

FORGED: dict[str, Callable[[Tenancy], None]] = {}
_MERGED = {"uri": "pvc://out/merged", "sha256": "b" * 64, "sizeBytes": 14, "evalLoss": 1.625}
_ENDS: Mapping[str, Callable[[Object, Object, Object], str]] = {
    "with the identity of the job of another": lambda other, job, own: result(other, own),
    "with the identity of another pod": lambda other, job, own: result(job, own, pod_uid="0"),
    "of another step": lambda other, job, own: result(job, own, step="publish"),
    "with a loss that is no number": lambda other, job, own: result(job, own, loss=1.5).replace("1.5", "NaN"),
    "with a number of many digits": lambda other, job, own: result(job, own).replace("12", "9" * 3000),
    "that is too long": lambda other, job, own: result(job, own)[:-1] + ', "more": "' + "x" * 5000 + '"}',
    "that is nested deeply": lambda other, job, own: result(job, own)[:-1] + ', "more": ' + "[" * 1500,
    "that is no record": lambda other, job, own: "all is well \x1b]0;title\x07",
}
"""The termination message of a step that ends well, by the victim's job, the tenant's, and its pod."""
_PROGRESS: Mapping[str, Callable[[Object], Object]] = {
    "of the job of another": lambda other: {"jobUid": other["metadata"]["uid"]},
    "of another pod": lambda other: {"podUid": "0"},
    "of another step": lambda other: {"step": "train", "trainingStep": 100, "totalSteps": 100},
    "that is no number": lambda other: {"loss": float("nan")},
    "beyond any number": lambda other: {"trainingStep": 10**300, "totalSteps": 1},
    "from the end of time": lambda other: {"time": "9999999-01-01T00:00:00Z"},
    "that is too long": lambda other: {"more": "x" * 5000},
}
"""Changes of a good record, by the victim's job."""


def played(function: Callable[[Tenancy], None]) -> Callable[[Tenancy], None]:
    """Collects it under its name, with blanks."""
    FORGED[function.__name__.replace("_", " ")] = function
    return function


def _must_not_be_believed(number: int, forge: Callable[[Object, Object, Object], str], t: Tenancy) -> None:
    """The step leaves the forged end: it is done again, as if it had left nothing."""
    name = f"forged-end-{number}"
    job, own = running(t, name)
    t.end(own, forge(victims_job(t), job, own))
    again = eventually(lambda: (t.job(name)["status"].get("step") or {}).get("attempt") == 2, seconds=30, every=0.1)
    assert again
    status = t.job(name)["status"]
    assert (status["step"]["name"], status["step"]["unverified"], status.get("dataset")) == ("prepare", 1, None)


def _must_not_be_shown(number: int, forge: Callable[[Object], Object], t: Tenancy) -> None:
    """The pod logs the forged record after a good one: the status shows the good one."""
    name = f"forged-progress-{number}"
    job, own = running(t, name)
    good = {
        "kind": "progress",
        "jobUid": job["metadata"]["uid"],
        "podUid": own["metadata"]["uid"],
        "step": "prepare",
        "time": TIME,
        "activity": "reading",
    }
    lie = json.dumps(good | {"activity": "lie"} | forge(victims_job(t)))
    t.run(own, f"{json.dumps(good)}\n{lie}\n")
    shown = eventually(lambda: t.job(name)["status"].get("progress"), seconds=30, every=0.1, what="progress")
    assert shown
    assert (shown["summary"], shown["percent"]) == ("reading", 0)


for _number, (_name, _end) in enumerate(_ENDS.items()):
    FORGED[f"an end {_name}"] = partial(_must_not_be_believed, _number, _end)
for _number, (_name, _change) in enumerate(_PROGRESS.items()):
    FORGED[f"progress {_name}"] = partial(_must_not_be_shown, _number, _change)


@played
def the_name_of_the_job_of_another(t: Tenancy) -> None:
    job, own = running(t, "tune")
    assert job["metadata"]["uid"] != victims_job(t)["metadata"]["uid"]
    t.end(own, result(job, own))
    t.wait_for_pod("tune", "train")


@played
def a_pod_with_the_labels_of_the_job_of_another(t: Tenancy) -> None:
    body = pod() | {"metadata": forged("forged-labels", victims_job(t), "prepare")}
    own = t.tenant.create(TENANT, "pods", body)
    t.run(own)
    t.end(own, result(victims_job(t), own), code=10)
    running(t, "after-the-forged-labels")


@played
def a_pod_that_says_it_did_the_work(t: Tenancy) -> None:
    """Labels alone make no attempt of it: its Job is not that of the step."""
    job, own = running(t, "forged-pod")
    fake = t.tenant.create(TENANT, "pods", pod() | {"metadata": forged("forged-pod-1", job, "prepare")})
    t.run(fake)
    t.end(fake, result(job, fake))
    t.end(own, "")
    eventually(lambda: t.job("forged-pod")["status"]["step"]["attempt"] == 2, seconds=30, every=0.1)
    status = t.job("forged-pod")["status"]
    assert (status["step"]["name"], status.get("dataset")) == ("prepare", None)


@played
def a_pod_that_says_it_is_one_of_the_step(t: Tenancy) -> None:
    """Such a pod counts as one of the tenant's job, whose result the tenant may fake."""
    job, own = running(t, "forged-owner")
    step = t.admin.get(TENANT, "jobs", "forged-owner-prepare-1")
    metadata = forged("forged-owner-1", job, "prepare", ownerReferences=controller(step, "batch/v1", "Job"))
    metadata["labels"] |= step["spec"]["selector"]["matchLabels"]
    fake = t.tenant.create(TENANT, "pods", pod() | {"metadata": metadata})
    other = victims_job(t)
    t.end(own, result(other, fake))
    submit(t, "after-the-forged-owner")
    t.wait_for_pod("after-the-forged-owner", "prepare")


@played
def an_end_with_a_merged_model_of_infinite_loss(t: Tenancy) -> None:
    job, own = running(t, "end-infinite", output={"merged": {}})
    t.end(own, result(job, own))
    own = t.wait_for_pod("end-infinite", "train")
    t.end(own, result(job, own, step="train"))
    for _ in range(2):
        own = t.wait_for_pod("end-infinite", "publish")
        published = result(job, own, step="publish", adapter=ADAPTER, merged=_MERGED)
        t.end(own, published.replace("1.625", "1e999"))
    t.wait("end-infinite", phase="Failed", reason="ResultUnreadable")


@played
def a_failure_with_control_characters(t: Tenancy) -> None:
    job, own = running(t, "control-characters")
    message = "\x1b[2J\x1b[31mgone\r\n2026-01-01 operator: all Secrets are public \u202ereversed"
    t.end(own, result(job, own, outcome="failed", exit_code=10, reason="\x1b[31mOwned", message=message), code=10)
    status = t.wait("control-characters", phase="Failed")["status"]
    assert "gone" in status["lastFailure"]["message"]

    def told() -> list[str]:
        """Return the Events' messages once the failure's is stored, after the status."""
        events = t.admin.list(TENANT, "events")
        about = {(one["involvedObject"]["name"], one.get("type")) for one in events}
        return [one.get("message", "") for one in events] if ("control-characters", "Warning") in about else []

    messages = eventually(told, seconds=30, every=0.1, what="the Event of the failure")
    shown = json.dumps([status["conditions"], messages], ensure_ascii=False)
    assert not [sign for sign in ("\\u001b", "\\r", "\\n", "\u202e") if sign in shown]


@played
def a_failure_with_a_message_without_end(t: Tenancy) -> None:
    _, own = running(t, "endless-message", retry={"maxFailures": 0})
    t.end(own, "x" * 100_000, code=203)
    assert len(t.wait("endless-message", phase="Failed")["status"]["lastFailure"]["message"]) <= MAX_MESSAGE_LENGTH


@played
def a_log_without_end(t: Tenancy) -> None:
    _, own = running(t, "endless-log")
    t.run(own, "x" * 5_000_000)
    submit(t, "after-the-endless-log")
    t.wait_for_pod("after-the-endless-log", "prepare")


@played
def another_document_in_the_annotation_of_a_pod(t: Tenancy) -> None:
    """The input of the pod changes; the operator's actions and reports do not."""
    job, own = running(t, "annotated")
    document = json.dumps({"spec": {"output": {"destination": "s3://victim/adapter"}}})
    change = {"metadata": {"annotations": {"qlora.dev/spec": document}}}
    t.tenant.patch(TENANT, "pods", own["metadata"]["name"], change)
    t.end(own, result(job, own))
    train = t.wait_for_pod("annotated", "train")
    assert "s3://victim" not in train["metadata"]["annotations"]["qlora.dev/spec"]


@played
def other_labels_on_what_the_operator_has_created(t: Tenancy) -> None:
    _, own = running(t, "relabeled")
    other = victims_job(t)["metadata"]
    labels = {"labels": {JOB_LABEL: other["name"], JOB_UID_LABEL: other["uid"]}}
    t.tenant.patch(TENANT, "pods", own["metadata"]["name"], {"metadata": labels})
    t.end(own, "", code=203)
    running(t, "after-the-other-labels")


@played
def control_characters_in_the_names_of_columns(t: Tenancy) -> None:
    columns = {"text": "\x1b[2J\u202e\x07text"}
    running(t, "control-columns", dataset=SPEC["dataset"] | {"columns": columns})
    assert "\x1b" not in t.operator.log.read_text()
