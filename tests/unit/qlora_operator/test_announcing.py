"""What is announced of a finished job, and that nothing else of the job waits for it."""

import json
from typing import Any

from qlora_operator.decisions.announcing import (
    entry,
    is_to_be_announced,
    with_announcement,
    without_announcement,
)
from qlora_operator.decisions.plan import Announce, CreateJob, plan
from tests.support.builders import (
    ADAPTER,
    NAME,
    after,
    child,
    conditions_of,
    facts,
    follow,
    make_job,
    reason_of,
    seen,
    status_in,
    succeeded,
)

FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))

ANNOUNCED: dict[str, Any] = {"output": {"announce": {"configMap": "adapters"}}}


def test_the_entry_names_the_base_as_servers_do() -> None:
    assert json.loads(entry(NAME, ADAPTER))["base"] == "org/model"
    elsewhere = ADAPTER.model_copy(update={"base_model": "pvc://models/llama"})
    assert json.loads(entry(NAME, elsewhere))["base"] == "pvc://models/llama"


def test_only_a_job_that_has_succeeded_is_announced_and_only_until_it_is() -> None:
    assert not is_to_be_announced(make_job(FINISHED), FINISHED)
    assert not is_to_be_announced(make_job(status_in("publish"), **ANNOUNCED), status_in("publish"))
    job = make_job(FINISHED, **ANNOUNCED)
    assert is_to_be_announced(job, FINISHED)
    written = with_announcement(FINISHED, facts(job))
    assert not is_to_be_announced(job, written)


def test_the_clean_up_does_not_wait_for_an_entry_that_is_rejected() -> None:
    job = make_job(FINISHED, cleanupAfterSeconds=1, **ANNOUNCED)
    actions = plan(job, FINISHED, seen(), after(100)).actions
    assert actions == (Announce(), CreateJob("clean", 1))
    rejected = without_announcement(FINISHED, facts(job), "forbidden")
    assert conditions_of(rejected)["Succeeded"] == "True"
    assert reason_of(rejected, "Announced") == "AnnouncementRejected"
