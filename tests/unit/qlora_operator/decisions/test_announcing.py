"""The announcement of a finished job; nothing else of the job waits for it."""

import asyncio
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import pytest

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.announcing import (
    entry,
    is_to_be_announced,
    with_announcement,
    without_announcement,
)
from qlora_operator.decisions.events import announcement_event
from qlora_operator.decisions.manifests.network import DEFAULT_DNS
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.plan import Announce, CreateJob
from qlora_operator.kube.errors import ClusterError, ForbiddenError, RejectedError, UnavailableError
from qlora_operator.reconcile.actions import Actions, Result
from qlora_operator.reconcile.pauses import Postponed
from qlora_operator.watch.store import Store
from tests.support.builders import (
    ADAPTER,
    NAME,
    NOW,
    PROFILE,
    after,
    child,
    conditions_of,
    facts,
    follow,
    make_job,
    message_of,
    plan_of,
    present,
    reason_of,
    seen,
    status_in,
    succeeded,
)

FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))

ANNOUNCED: dict[str, Any] = {"output": {"announce": {"configMap": "adapters"}}}


def test_the_entry_names_the_base_as_in_servers() -> None:
    assert json.loads(entry(NAME, ADAPTER))["base"] == "org/model"
    elsewhere = ADAPTER.model_copy(update={"base_model": "pvc://models/llama"})
    assert json.loads(entry(NAME, elsewhere))["base"] == "pvc://models/llama"


def test_only_a_job_that_has_succeeded_is_announced_and_only_until_it_is() -> None:
    assert not is_to_be_announced(make_job(FINISHED), FINISHED)
    assert not is_to_be_announced(make_job(status_in("publish"), **ANNOUNCED), status_in("publish"))
    job = make_job(FINISHED, **ANNOUNCED)
    assert is_to_be_announced(job, FINISHED)
    written = with_announcement(FINISHED, job)
    assert not is_to_be_announced(job, written)
    longest = make_job(FINISHED, output={"announce": {"configMap": "m" * 253}})
    QLoRAJobStatus.model_validate(with_announcement(FINISHED, longest).dump())


def test_the_clean_up_does_not_wait_for_an_entry_that_is_rejected() -> None:
    job = make_job(FINISHED, cleanupAfterSeconds=1, **ANNOUNCED)
    actions = plan_of(job, FINISHED, seen(), after(100)).actions
    assert actions == (Announce(), CreateJob("clean", 1))
    rejected = without_announcement(FINISHED, "forbidden")
    assert conditions_of(rejected)["Succeeded"] == "True"
    assert present(rejected.announcement).rejection == "forbidden"


class Rejecting:
    """Answers each write of a ConfigMap in the same way, and creates any Job."""

    def __init__(self, error: ClusterError | None) -> None:
        self.error = error
        self.patches = 0

    async def patch_config_map(self, namespace: str, name: str, patch: Sequence[Object]) -> None:
        self.patches += 1
        if self.error is not None:
            raise self.error

    async def create_job(self, namespace: str, manifest: Object) -> Object:
        return {**child("publish"), "metadata": {**child("publish")["metadata"], "name": f"{NAME}-clean-1"}}


def announce(cluster: Rejecting, postponed: Postponed, at: float, *actions: Any, **profile: Any) -> Result:
    profiles = {"default": PROFILE, "other": Profile.model_validate(PROFILE.dump() | profile)}
    found = facts(make_job(FINISHED, **ANNOUNCED), now=after(at), profiles=profiles)
    carry_out = Actions(cluster, Store(), DEFAULT_DNS, AsyncMock(), postponed).carry_out  # type: ignore[arg-type]
    return asyncio.run(carry_out(found, FINISHED, (Announce(), *actions)))


@pytest.mark.parametrize(
    ("error", "tries"), [(ForbiddenError("the operator may not"), 1), (RejectedError("the test failed"), 2)]
)
def test_a_rejected_entry_is_retried_with_backoff(error: RejectedError, tries: int) -> None:
    """And with the other patch only where that may be the cause."""
    cluster, postponed, times = Rejecting(error), Postponed(), list[float]()
    for at in range(0, 48 * 3600, 300):
        result = announce(cluster, postponed, at)
        assert not result.blocked
        assert result.look_again is not None
        if cluster.patches:
            times.append(at)
            cluster.patches = cluster.patches - tries
            assert cluster.patches == 0
            assert NOW + timedelta(seconds=at) < result.look_again <= NOW + timedelta(seconds=at + 7200)
    assert len(times) < 35
    assert times[-1] - times[-2] == 7200
    # It is allowed at last, and the job is dropped.
    cluster.error = None
    done = announce(cluster, postponed, 51 * 3600)
    assert (present(done.status.announcement).entry, done.look_again) == ("adapters/tune.json", None)


def test_the_clean_up_does_not_depend_on_the_entry() -> None:
    cluster = Rejecting(UnavailableError("no answer"))
    result = announce(cluster, Postponed(), 0, CreateJob("clean", 1))
    assert result.changed
    assert result.status.announcement is None
    assert result.look_again == after(5)


def test_one_event_reports_that_an_adapter_is_not_announced() -> None:
    rejected = announce(Rejecting(RejectedError("not ours")), Postponed(), 0).status
    event = present(announcement_event(make_job(FINISHED), rejected, NOW))
    assert (event["type"], event["reason"]) == ("Warning", "AnnouncementRejected")
    assert announcement_event(make_job(rejected), rejected, NOW) is None
    assert announcement_event(make_job(FINISHED), FINISHED, NOW) is None


def test_no_entry_is_written_where_a_profile_expects_certificates() -> None:
    """A ConfigMap that a job creates would keep every pod waiting for its key."""
    taken = {"caConfigMap": {"name": "adapters", "key": "ca.pem"}}
    waits = follow(
        make_job(**ANNOUNCED), profiles={"default": PROFILE, "ca": Profile.model_validate({**PROFILE.dump(), **taken})}
    )
    assert (waits.resolved, reason_of(waits)) == (None, "ConfigMapNotAllowed")
    assert message_of(waits).startswith("spec.output.announce.configMap names 'adapters'")
    # Of a job that had started before the profile named it.
    cluster = Rejecting(None)
    result = announce(cluster, Postponed(), 0, **taken)
    assert cluster.patches == 0
    assert "expects certificates" in present(result.status.announcement).rejection
