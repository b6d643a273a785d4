"""Limits of a profile for a namespace: users, size, and number of running jobs."""

import asyncio
import contextlib
from typing import Any

import pytest

from qlora_api.kubernetes_values import amount
from qlora_api.naming import JOB_LABEL, SPEC_ANNOTATION
from qlora_api.profile import Profile
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import Resolved
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.objects import Observed
from qlora_operator.decisions.observed.stored_job import parse_job, with_resolved
from qlora_operator.decisions.plan import is_settled
from qlora_operator.decisions.profile_limit import held_back, limit_of_jobs
from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.profile_limit import SECONDS_BETWEEN_LOOKS, SECONDS_FULL, Starts
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.watch.store import Store
from tests.support.builders import (
    DATASET,
    NOW,
    PROFILE,
    REVISION,
    child,
    facts,
    failed,
    follow,
    job_body,
    make_job,
    message_of,
    present,
    reason_of,
    resolved,
    starts,
    status_in,
    time,
)
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import AnswerError, ApiServer, Object

OTHERS = {"names": ["other"]}


def limited(**fields: Any) -> dict[str, Profile]:
    """The only profile, with these settings."""
    return {"default": Profile.model_validate(PROFILE.dump() | fields)}


@pytest.mark.parametrize(
    ("settings", "spec", "reason", "says"),
    [
        (
            {"allowedNamespaces": OTHERS},
            {},
            "ProfileNotAllowed",
            "is not for namespace 'team', whose profiles are: none",
        ),
        ({"limits": {"gpus": 2}}, {"resources": {"gpus": 3}}, "LimitExceeded", "spec.resources.gpus is 3, and profile"),
        ({"limits": {"workspaceSize": "50Gi"}}, {"workspace": {"size": "54G"}}, "LimitExceeded", "allows 50Gi"),
        ({"limits": {"workspaceSize": "10Gi"}}, {}, "LimitExceeded", "spec.workspace.size is 50Gi"),
        ({"limits": {"jobs": 2}}, {}, "JobLimitReached", "2 jobs of profile 'default' have started"),
    ],
)
def test_a_job_above_its_profiles_limits_waits_with_a_reason(
    settings: dict[str, Any], spec: dict[str, Any], reason: str, says: str
) -> None:
    job = make_job(**spec)
    assert follow(job, jobs_of_profile=2).resolved is not None
    status = follow(job, profiles=limited(**settings), jobs_of_profile=2)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, reason)
    assert says in message_of(status)


def test_a_revision_that_no_status_names_takes_no_place() -> None:
    job = with_resolved(make_job(), REVISION, resolved())
    assert follow(job).current_revision == REVISION
    status = follow(job, profiles=limited(limits={"jobs": 1}), jobs_of_profile=1)
    assert (status.phase, status.current_revision, reason_of(status)) == ("Pending", None, "JobLimitReached")


def prompted(text: str, **score: str) -> dict[str, Any]:
    """A data set with that system prompt, and a gate if there is a score."""
    spec = {"dataset": DATASET | {"systemPrompt": {"text": text}, "eval": {"fraction": 0.1}}}
    return spec | ({"gate": {"minScore": 0.5, "score": score}} if score else {})


def test_a_system_prompt_of_any_characters_reaches_the_pods() -> None:
    text = "\N{PARROT}" * 16_384
    job = make_job(**prompted(text))
    resolved = present(follow(job).resolved)
    assert resolved == Resolved.model_validate(resolved.dump())
    annotations = build_job(job, resolved, "prepare", 1)["spec"]["template"]["metadata"]["annotations"]
    assert sum(len(name.encode()) + len(text.encode()) for name, text in annotations.items()) < 256 * 1024
    read = QLoRAJobDocument.model_validate_json(annotations[SPEC_ANNOTATION])
    assert present(read.spec.dataset.system_prompt).text == text


def test_a_spec_too_large_for_an_annotation_waits_and_names_its_long_texts() -> None:
    schema = "\x01" * 8192  # six bytes each, in JSON
    status = follow(make_job(**prompted("\x01" * 16_383 + "a", check="jsonSchema", schema=schema)))
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "SpecTooLarge")
    assert "and may have 130048: create the job again with a shorter spec.dataset.systemPrompt" in message_of(status)


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        ({"allowedNamespaces": {"names": ["other", "team"]}}, {}),
        ({"limits": {"gpus": 2}}, {"resources": {"gpus": 2}}),
        ({"limits": {"workspaceSize": "50Gi"}}, {"workspace": {"size": "53G"}}),
        ({"limits": {"workspaceSize": "10Gi"}}, {"workspace": {"claimName": "own"}}),
        ({"limits": {"jobs": 3}}, {}),
        ({"limits": {}}, {"resources": {"gpus": 16}}),
    ],
)
def test_a_job_within_its_profiles_limits_starts(settings: dict[str, Any], spec: dict[str, Any]) -> None:
    profiles = limited(**settings)
    status = follow(make_job(**spec), profiles=profiles, jobs_of_profile=2)
    # The names of other tenants' namespaces are not for this one, and an older release reads the status as before.
    assert {"allowedNamespaces", "limits"}.isdisjoint(present(status.resolved).profile.dump())
    # Later limits do not stop a job that has started.
    later = follow(make_job(status_in("train")), profiles=limited(allowedNamespaces=OTHERS, limits={"jobs": 1}))
    assert later.step is not None


def test_a_namespace_learns_only_of_profiles_that_it_may_use() -> None:
    profiles = limited() | {"secret": Profile.model_validate(PROFILE.dump() | {"allowedNamespaces": OTHERS})}
    for asked in ("unknown", "secret"):
        status = follow(make_job(scheduling={"profileName": asked}), profiles=profiles)
        assert message_of(status).split("are: ")[1].split(";")[0] == "default"


def test_a_failed_job_is_retried_only_within_the_current_limits() -> None:
    ends = (child("publish", Failed="PodFailurePolicy"), failed("publish", 10, "BadConfiguration", "the key expired"))
    stored, profiles = follow(make_job(status_in("publish")), *ends), limited(limits={"jobs": 1})
    job = make_job(stored, retry={"request": "a"})
    assert limit_of_jobs(job, profiles) == 1
    held = follow(job, profiles=profiles, jobs_of_profile=1)
    assert (held.phase, reason_of(held, "Stalled"), held.retry_request) == ("Failed", "JobLimitReached", None)
    assert held_back(facts(job, profiles=profiles, jobs_of_profile=1)) is not None
    elsewhere = limited(allowedNamespaces=OTHERS, limits={"jobs": 1})
    assert held_back(facts(job, profiles=elsewhere, jobs_of_profile=1)) is None, "nobody's end would help"
    assert follow(make_job(held, retry={"request": "a"}), profiles=profiles).phase == "Publishing"
    # A request that is withdrawn leaves the failure as the reason.
    withdrawn = follow(make_job(held, generation=2), profiles=profiles, jobs_of_profile=1)
    assert reason_of(withdrawn, "Stalled") == reason_of(stored, "Stalled") == "BadConfiguration"
    assert message_of(withdrawn, "Stalled") == message_of(stored, "Stalled")
    assert follow(job, profiles=limited(allowedNamespaces=OTHERS)).phase == "Failed"


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("1.5Gi", 3 * 2**29), ("50G", 50 * 10**9), ("2P", 2 * 10**15), ("500m", 0.5)]
)
def test_a_quantity_is_compared_by_value(text: str, number: float) -> None:
    assert amount(text) == number


class Namespace(ApiServer):
    """One namespace's QLoRAJobs, and their operator, whose requests take turns."""

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(Agenda(0))
        self.put("qlorajobs", *(self.body(f"job-{number}") for number in range(count)))
        self.woken: list[Any] = []
        self.failures: dict[str, Exception] = {}
        """For the writes of a job's status, by its name."""
        self.counts = 0
        self.now = 0.0
        self.check = self._check
        cluster, self._shown = Cluster(self), Store()
        starts = Starts(cluster.profiles_in_use, self.woken.append, lambda: self.now)
        profiles = limited(limits={"jobs": limit})
        self._operator = Reconciler(cluster, profiles, None, Metrics(), lambda: NOW, starts, self._shown)

    async def send(self, method: str, path: str, **request: Any) -> tuple[int, bytes]:
        await asyncio.sleep(0)
        self.counts += "fieldSelector" in dict(request.get("query") or ())
        return await super().send(method, path, **request)

    def _check(self, method: str, kind: str, before: Object | None, after: Object | None) -> None:
        if before is not None and kind == "qlorajobs" and before["metadata"]["name"] in self.failures:
            raise self.failures[before["metadata"]["name"]]
        # A job with a Job counts, whatever happens to the next write of its status.
        if (method, kind) == ("POST", "jobs"):
            assert present(after)["metadata"]["labels"][JOB_LABEL] in self.started()

    def show(self, name: str, **metadata: str) -> None:
        """Change its metadata, as a watch shows it."""
        self._shown.job_changed(self.change("qlorajobs", name, metadata=metadata))

    def delete(self, *names: str) -> None:
        """Delete these QLoRAJobs, as a watch shows it."""
        for name in names:
            self._shown.job_changed(self.objects["qlorajobs"].pop(name), deleted=True)

    @staticmethod
    def body(name: str) -> dict[str, Any]:
        body = job_body()
        return body | {"metadata": body["metadata"] | {"name": name, "uid": f"uid-{name}"}}

    def started(self) -> list[str]:
        return [body["metadata"]["name"] for body in self.all("qlorajobs") if body["status"].get("currentRevision")]

    def reconcile(self, *names: str) -> None:
        """All of them concurrently."""

        async def all_at_once() -> None:
            await asyncio.gather(*(self._operator.reconcile(("team", name)) for name in names))

        asyncio.run(all_at_once())

    def serve(self) -> None:
        """The woken jobs, until none is."""
        while self.woken:
            with contextlib.suppress(RetryError, ArithmeticError):
                self.reconcile(self.woken.pop(0)[1])


def test_concurrent_passes_start_no_more_jobs_than_the_profile_allows() -> None:
    namespace = Namespace(count=50, limit=3)
    namespace.reconcile(*namespace.objects["qlorajobs"])
    assert len(namespace.started()) == 3
    # Three that found room, and one that found none.
    assert namespace.counts == 4


def test_the_longest_waiting_job_starts_when_another_ends_or_is_deleted() -> None:
    namespace = Namespace(count=5, limit=2)
    for name in namespace.objects["qlorajobs"]:
        namespace.reconcile(name)
    assert namespace.started() == ["job-0", "job-1"]
    namespace.delete("job-0")
    namespace.reconcile("job-0")
    namespace.serve()
    assert namespace.started() == ["job-1", "job-2"]
    # A waiting job is deleted, and a running one: the next in the queue starts.
    namespace.delete("job-3", "job-1")
    namespace.reconcile("job-3", "job-1")
    namespace.serve()
    assert namespace.started() == ["job-2", "job-4"]


@pytest.mark.parametrize("failure", [AnswerError(403, "denied by a webhook"), ArithmeticError("a defect")])
def test_a_waiting_job_whose_pass_fails_lets_the_next_one_start(failure: Exception) -> None:
    namespace = Namespace(count=4, limit=1)
    for name in namespace.objects["qlorajobs"]:
        namespace.reconcile(name)
    namespace.failures = {"job-1": failure, "job-2": failure}
    namespace.delete("job-0")
    namespace.reconcile("job-0")
    namespace.serve()
    assert namespace.started() == ["job-3"]


def test_a_job_stuck_in_deletion_blocks_no_other() -> None:
    namespace = Namespace(count=4, limit=1)
    for name in namespace.objects["qlorajobs"]:
        namespace.reconcile(name)
    namespace.show("job-1", deletionTimestamp=time())
    namespace.delete("job-0")
    namespace.reconcile("job-0")
    namespace.serve()
    assert namespace.started() == ["job-2"]


def test_the_head_of_the_queue_is_requeued_periodically() -> None:
    waiting = starts()
    first, second = make_job(), parse_job(Namespace.body("second"))
    assert waiting.wait(first) == SECONDS_BETWEEN_LOOKS
    assert waiting.wait(second) is None
    waiting.place_may_be_free((first.namespace, first.name))
    assert waiting.wait(second) == SECONDS_BETWEEN_LOOKS


def test_a_job_that_waits_for_its_retry_is_not_settled() -> None:
    ends = (child("publish", Failed="PodFailurePolicy"), failed("publish", 10, "BadConfiguration", "the key expired"))
    stored = follow(make_job(status_in("publish")), *ends)
    assert is_settled(make_job(stored), Observed())
    assert not is_settled(make_job(stored, retry={"request": "a"}), Observed())


def test_a_full_count_expires() -> None:
    namespace = Namespace(count=2, limit=1)
    namespace.reconcile("job-0")
    namespace.reconcile("job-1")
    finished = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}
    first = present(namespace.get("qlorajobs", "job-0"))
    namespace.change("qlorajobs", "job-0", status=first["status"] | finished)
    namespace.reconcile("job-1")
    assert namespace.started() == ["job-0"]
    namespace.now = SECONDS_FULL
    namespace.reconcile("job-1")
    assert namespace.started() == ["job-0", "job-1"]
