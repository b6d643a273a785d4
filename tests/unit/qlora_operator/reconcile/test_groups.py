"""Many jobs of one group that are looked at at once: each is trained by one job, and what each reads is live."""

import asyncio
import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from qlora_api.contract import ProgressRecord, encode_record
from qlora_api.spec.group import GroupMemberStatus, GroupStatus
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.observed.members import GroupFacts, member_of
from qlora_operator.kube.listing import ChildList
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.watch.store import Store
from tests.support.builders import (
    NOW,
    PROFILES,
    child,
    job_body,
    pod,
    progress,
    running,
    seen,
    starts,
    status_in,
    time,
)
from tests.support.grouped import ALL, FOLLOWER, UIDS, alphas, job

PREPARED = status_in("train").dump()


class Namespace:
    """What is stored of prepared jobs of one group, and the operator, which answers after a moment."""

    def __init__(self, count: int, size: int) -> None:
        self.bodies = {name: self._body(name, size) for name in (f"job-{number}" for number in range(count))}
        self.created: dict[str, list[str]] = {}
        self.woken: list[Any] = []
        self.moments_of_a_write = 1
        self.asked_for = {name: asyncio.Event() for name in self.bodies}
        self.store = Store()
        for body in self.bodies.values():
            self.store.job_changed(body)
        waker = starts(woken=self.woken)
        self.operator = Reconciler(self, PROFILES, None, Metrics(), lambda: NOW, waker, self.store)  # type: ignore[arg-type]

    @staticmethod
    def _body(name: str, size: int) -> dict[str, Any]:
        fixed = PREPARED["resolved"] | {"workspacePath": f"{name}-folder", "document": '{"spec":{}}'}
        step = {"name": "train", "jobName": f"{name}-train-1", "attempt": 1}
        body = job_body(
            PREPARED | {"resolved": fixed, "step": step},
            group={"name": "rates", "size": size},
            workspace={"claimName": "team"},
        )
        return body | {"metadata": body["metadata"] | {"name": name, "uid": f"uid-{name}"}}

    async def get_qlora_job(self, _namespace: str, name: str) -> dict[str, Any] | None:
        self.asked_for[name].set()
        await asyncio.sleep(0)
        return self.bodies.get(name)

    async def list_jobs(self, *_: Any) -> ChildList:
        await asyncio.sleep(0)
        return ChildList([], "9")

    list_pods = list_jobs

    async def create_event(self, *_: Any) -> None:
        await asyncio.sleep(0)

    async def create_job(self, _namespace: str, manifest: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        name = manifest["metadata"]["name"]
        arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
        self.created[name] = [folder for document, folder in pairwise(arguments) if "/with/" in document]
        created = {"uid": f"uid-{name}", "resourceVersion": "8", "creationTimestamp": time()}
        return manifest | {"metadata": manifest["metadata"] | created}

    async def apply_status(self, of: Any, status: dict[str, Any]) -> dict[str, Any]:
        for _ in range(self.moments_of_a_write):
            await asyncio.sleep(0)
        before = self.bodies[of.name]
        newer = {"resourceVersion": str(int(before["metadata"]["resourceVersion"]) + 1)}
        self.bodies[of.name] = before | {"status": status, "metadata": before["metadata"] | newer}
        return self.bodies[of.name]

    def settle(self, names: list[str]) -> None:
        """Look at all of these at once, then at whoever was woken, until nobody is."""
        asyncio.run(self.settled(names))

    async def settled(self, names: list[str]) -> None:
        while names:
            await asyncio.gather(*(self.operator.reconcile(("team", name)) for name in names))
            names = list({key[1] for key in self.woken})
            self.woken.clear()

    def status(self, name: str) -> QLoRAJobStatus:
        return QLoRAJobStatus.model_validate(self.bodies[name]["status"])


def test_each_job_is_trained_by_one_although_all_are_looked_at_at_once() -> None:
    namespace = Namespace(count=7, size=3)
    for _ in range(3):
        namespace.settle(list(namespace.bodies))
    leaders = Counter(group.leader for name in namespace.bodies if (group := namespace.status(name).group))
    assert leaders == {"job-0": 3, "job-3": 3}
    assert namespace.created == {
        "job-0-train-1": ["/workspace/job-1-folder", "/workspace/job-2-folder"],
        "job-3-train-1": ["/workspace/job-4-folder", "/workspace/job-5-folder"],
    }
    assert namespace.status("job-6").group is None


def test_a_job_that_comes_while_another_is_about_to_lead_is_not_led_twice() -> None:
    namespace = Namespace(count=3, size=2)
    namespace.moments_of_a_write = 50
    late = namespace.bodies.pop("job-0")
    namespace.store.job_changed(late, deleted=True)
    late = late | {"metadata": late["metadata"] | {"uid": "uid-late"}}

    async def both_at_once() -> None:
        first = asyncio.create_task(namespace.operator.reconcile(("team", "job-1")))
        # It knows now of whom it is going to form the group.
        await namespace.asked_for["job-2"].wait()
        namespace.bodies["job-0"] = late
        namespace.store.job_changed(late)
        await asyncio.gather(first, namespace.operator.reconcile(("team", "job-0")))
        await namespace.settled(list(namespace.bodies))

    asyncio.run(both_at_once())
    leaders = {name: group.leader for name in namespace.bodies if (group := namespace.status(name).group)}
    assert leaders == {"job-1": "job-1", "job-2": "job-1"}


def test_who_is_suspended_or_gone_without_a_sign_is_left_out() -> None:
    namespace = Namespace(count=3, size=3)
    # The watches have not shown that yet.
    namespace.bodies["job-1"]["spec"]["suspend"] = True
    namespace.settle(["job-0"])
    assert namespace.created == {}
    assert namespace.status("job-0").group is None
    del namespace.bodies["job-1"]["spec"]["suspend"]
    namespace.settle(["job-0", "job-1", "job-2"])
    assert list(namespace.created) == ["job-0-train-1"]


def test_a_job_that_has_failed_notes_that_the_group_was_formed_without_it() -> None:
    namespace = Namespace(count=3, size=3)
    failed = namespace.bodies["job-1"]
    condition = {"type": "Failed", "status": "True", "reason": "BadDataset", "lastTransitionTime": time()}
    step = {"name": "prepare", "jobName": "job-1-prepare-2", "attempt": 2}
    failed["status"] |= {"conditions": [condition], "phase": "Failed", "step": step}
    for _ in range(2):
        namespace.settle(list(namespace.bodies))
    assert namespace.created == {"job-0-train-1": ["/workspace/job-2-folder"]}
    assert [namespace.status(name).group for name in namespace.bodies if name != "job-2"] == [
        GroupStatus(leader=name, leader_uid=f"uid-{name}", members=tuple(members))
        for name, members in (
            ("job-0", [GroupMemberStatus(name=name, uid=f"uid-{name}") for name in ("job-0", "job-2")]),
            ("job-1", [GroupMemberStatus(name="job-1", uid="uid-job-1")]),
        )
    ]


def test_the_operator_keeps_no_lock_of_a_group_that_no_job_is_joining() -> None:
    namespace = Namespace(count=3, size=3)
    groups = namespace.operator._groups
    waiting = job()

    async def join() -> int:
        async with groups.joining(waiting):
            return len(groups._locks)

    assert asyncio.run(join()) == 1
    assert len(groups._locks) == 0


def test_the_index_follows_what_is_shown_of_a_job() -> None:
    namespace = Namespace(count=2, size=2)
    groups, body = namespace.store.groups, namespace.bodies["job-1"]
    assert {member.name for member in groups.of("team", "rates")} == {"job-0", "job-1"}
    assert groups.of("other", "rates") == ()
    newer = body | {"metadata": body["metadata"] | {"resourceVersion": "9"}}
    namespace.store.job_changed(newer | {"status": {"step": "what no operator has written"}})
    assert {member.name for member in groups.of("team", "rates")} == {"job-0"}
    namespace.store.job_changed(newer | {"metadata": newer["metadata"] | {"resourceVersion": "10"}})
    namespace.store.job_changed(newer | {"metadata": newer["metadata"] | {"resourceVersion": "11"}}, deleted=True)
    assert {member.name for member in groups.of("team", "rates")} == {"job-0"}


@pytest.mark.parametrize(
    ("own", "bodies", "record", "beside"),
    [
        (job(joined=FOLLOWER), [], 7, None),
        (job("training", "alpha", ALL), [alphas(child("train")), alphas(running(pod("train")))], 5, 9),
    ],
    ids=["follower", "leader"],
)
def test_one_log_tells_of_all(own: Any, bodies: list[Any], record: int, beside: int | None) -> None:
    leader = job("training", "alpha", ALL)
    group = GroupFacts(tuple(filter(None, [member_of(leader)])))
    steps = {"alpha": (5, -9), "tune": (7, -5), "zulu": (9, -2)}
    asked: list[str] = []

    async def read_log(_namespace: str, name: str) -> str:
        asked.append(name)
        uid = "uid-alpha-train-1-pod1"
        return "\n".join(
            encode_record(progress(job_uid=UIDS[job], pod_uid=uid, training_step=step, time=time(when)))
            for job, (step, when) in steps.items()
        )

    reader = ProgressReader(read_log, lambda: 0.0, concurrent=1)
    reading = asyncio.run(reader.read(("team", own.name), own, seen(*bodies), group))

    def step_of(found: ProgressRecord | None) -> int | None:
        return found.training_step if found is not None else None

    assert (step_of(reading.record), step_of(reading.beside)) == (record, beside)
    assert len(asked) == 1
    assert json.dumps(asked) in ('["the-pod"]', '["alpha-train-1-pod1"]')
