"""Invariants at each write of the operator, whatever has happened before."""

from datetime import datetime, timedelta
from math import inf
from typing import Any

from qlora_api.naming import (
    CELLS_ANNOTATION,
    JOB_UID_LABEL,
    STEP_LABEL,
    SUSPENDED_ANNOTATION,
    SWEEP_UID_LABEL,
    sweep_pod_name,
)
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.spec import SWEEP_KIND
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.observed.objects import parse_time
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer, Object, controller, merged
from tests.unit.qlora_operator.simulation.controllers import ENDS, has, over
from tests.unit.qlora_operator.simulation.kubelet import Kubelet, Run, read_folder

STEPS = ("prepare", "train", "publish", "clean")
_ENDED = ("Succeeded", "Failed")
_NEVER_LESS = ("firstAttempt", "activeSeconds", "highestAttempt")


class Invariants:
    """Checks each write by what the API server has stored and what the pods have really done."""

    def __init__(self, api: ApiServer, agenda: Agenda, kubelet: Kubelet, profile: Profile) -> None:
        self._api, self._agenda, self._kubelet = api, agenda, kubelet
        self._limit = profile.limits.jobs if profile.limits is not None else None
        self._names: dict[str, set[str]] = {}
        """The Jobs that each owner has noted in its status: none is created again."""
        self._owners: dict[str, Object] = {}
        """The jobs and sweeps as they are, or were when they were deleted, by UID."""
        self._gone: set[str] = set()
        self._claims: dict[str, str] = {}
        """The claims that the operator has created, by the UID of their job or sweep."""
        self._deletes: set[str] = set()
        """UIDs of those whose policy has, or had, the deletion of their claim."""
        api.check = self._check
        api.watches.append(self._watch)

    def _check(self, method: str, kind: str, before: Object | None, after: Object | None) -> None:
        match method, kind:
            case "POST", "jobs":
                self._job_is_made(after or {})
            case "POST", "qlorajobs":
                self._cell_is_made(after or {})
            case "DELETE", "jobs":
                self._job_is_deleted(before or {})
            case "DELETE", "qlorajobs" | "qlorasweeps":
                self._is_due(before or {})
            case "DELETE", "persistentvolumeclaims":
                self._claim_is_deleted(before or {})
            case "PATCH", "qlorajobs" if after is not None and "status" not in after:
                _cell_is_changed(before or {}, after)
            case "PATCH", "qlorajobs":
                self._status_is_written(before or {}, (after or {})["status"])
            case "PATCH", "qlorasweeps":
                self._sweep_status_is_written(before or {}, (after or {})["status"])

    def check_writers(self) -> None:
        """At most one attempt writes to a folder."""
        writers: dict[str, Run] = {}
        for run in self._kubelet.running():
            for folder in run.folders:
                other = writers.setdefault(folder, run)
                assert other.job == run.job, f"{run.pod} and {other.pod} write to {folder}"

    # --- Jobs

    def _job_is_made(self, body: Object) -> None:
        owner, name = controller(body), body["metadata"]["name"]
        prefix = name.rpartition("-")[0].rpartition("-")[0] if owner["kind"] == SWEEP_KIND else ""
        others = [job for job in self._api.owned("jobs", owner["uid"]) if _begins(job, prefix)]
        alive = [job["metadata"]["name"] for job in others if not has(job, *ENDS)]
        assert not alive, f"Job {name} is created beside {alive}"
        pods = [pod for pod in self._api.all("pods") if pod["metadata"]["labels"].get(JOB_UID_LABEL) == owner["uid"]]
        live = [pod["metadata"]["name"] for pod in pods if _begins(pod, prefix) and not over(pod)]
        assert not live, f"Job {name} is created beside pods {live}"
        assert name not in self._names.get(owner["uid"], ()), f"Job {name} is created a second time"
        if owner["kind"] == SWEEP_KIND:
            for cell in body["metadata"]["annotations"][CELLS_ANNOTATION].split(","):
                self._may_run(self._api.get("qlorajobs", cell), name)
        else:
            self._may_have_job(self._api.get("qlorajobs", owner["name"]), body)

    def _may_run(self, job: Object | None, name: str) -> None:
        """The QLoRAJob exists, and its user wants it to run."""
        assert job is not None, f"Job {name} is created for a QLoRAJob that is gone"
        assert "deletionTimestamp" not in job["metadata"], f"Job {name} is created for a QLoRAJob under deletion"
        assert not job["spec"].get("suspend"), f"Job {name} is created for a suspended QLoRAJob"
        assert not job["spec"].get("cancel"), f"Job {name} is created for a canceled QLoRAJob"
        assert not has(job, "Succeeded"), f"Job {name} is created for a QLoRAJob that has succeeded"
        assert not has(job, "Failed") or _is_retried(job["status"], job["spec"]), (
            f"Job {name} is created after a failure"
        )

    def _may_have_job(self, job: Object | None, body: Object) -> None:
        name, spec = body["metadata"]["name"], body["spec"]
        if body["metadata"]["labels"][STEP_LABEL] == "clean":
            assert job is not None
            seconds = job["spec"].get("cleanupAfterSeconds")
            assert seconds is not None or is_canceled(job), f"{name} is created and not asked for"
            wait = timedelta(seconds=seconds or 0)
            assert self._agenda.moment >= parse_time(job["status"]["completionTime"]) + wait, f"{name} is early"
            return
        if name.endswith("-prepare-1"):
            # Once a job is resolved, the other may go on: prepare copies checkpoints that it verifies, or fails.
            reads = read_folder(spec["template"]["spec"])
            # Only the train step writes checkpoints.
            writers = [run.pod for run in self._kubelet.running() if reads in run.folders and run.step == "train"]
            assert not writers, f"{name} is to read {reads} while {writers} write to it"
            return  # created by what the watch has shown, perhaps a moment too late
        self._may_run(job, name)
        assert job is not None
        claim = self._api.get("persistentvolumeclaims", self._claims.get(job["metadata"]["uid"], ""))
        assert claim is None or "deletionTimestamp" not in claim["metadata"], f"{name} is to mount a deleted claim"
        step, stored = body["metadata"]["labels"][STEP_LABEL], job["status"].get("step") or {}
        allowed = (job["spec"].get("retry") or {}).get("maxFailures", 3) if spec["completions"] == 1 else 0
        # A retry begins to count again, and is stored after its first Job is created.
        is_counted = stored.get("name") == step and not _is_retried(job["status"], job["spec"])
        counted = stored.get("failures", 0) if is_counted else 0
        assert spec["backoffLimit"] <= max(0, allowed - counted), f"{name} allows {spec['backoffLimit']} failures"
        runs, now = self._runs(job["metadata"]["uid"], job["status"]), self._agenda.now
        failed = [run for run in runs if run.step == step and (run.failed or run.stalled(now))]
        assert spec["backoffLimit"] >= allowed - len(failed), f"{name} allows {spec['backoffLimit']} failures"
        for other in self._api.all("jobs"):
            cells = (other["metadata"].get("annotations") or {}).get(CELLS_ANNOTATION, "").split(",")
            together = job["metadata"]["name"] in cells and not has(other, *ENDS)
            assert not together or step != "train", f"{name} trains what {other['metadata']['name']} trains"

    def _job_is_deleted(self, body: Object) -> None:
        owner = controller(body)
        job = self._api.get("qlorajobs", owner["name"]) if owner["kind"] != SWEEP_KIND else None
        if job is None or job["metadata"]["uid"] != owner["uid"] or has(body, *ENDS):
            return
        wanted = (job["status"].get("step") or {}).get("jobName") == body["metadata"]["name"]
        stops = job["spec"].get("suspend") or "deletionTimestamp" in job["metadata"] or has(job, *_ENDED)
        assert stops or not wanted, f"Job {body['metadata']['name']} is deleted for no reason"

    # --- ends

    def _is_due(self, body: Object) -> None:
        """It has ended so long ago, is not retried, and was cleaned up if that was due."""
        name, spec, status = body["metadata"]["name"], body["spec"], body["status"]
        assert has(body, *_ENDED), f"{name} is deleted before its end"
        assert not (has(body, "Failed") and _is_retried(status, spec)), f"{name} is deleted before its retry"
        assert not controller(body), f"{name} is deleted before its sweep"
        due = parse_time(status["completionTime"]) + timedelta(seconds=spec["ttlSecondsAfterFinished"])
        assert self._agenda.moment >= due, f"{name} is deleted before {due}"
        for pod in status.get("pods", ()):
            assert not _counting(pod, ""), f"{name} is deleted before its pod {pod['number']} has counted"
        for job in [body, *self._api.owned("qlorajobs", body["metadata"]["uid"])]:
            self._has_nothing_to_do(job, due)

    def _has_nothing_to_do(self, job: Object, due: datetime) -> None:
        name, status = job["metadata"]["name"], job["status"]
        # Of a pod of its sweep, a cell copies the part until its own end: the sweep counts the rest.
        assert not _counting(status, f"{name}-train-"), f"{name} is deleted before its pods have counted"
        wait = cleanup_seconds(job)
        if wait is None or "completionTime" not in status:
            return
        is_due = parse_time(status["completionTime"]) + timedelta(seconds=wait) <= due
        reason = _condition(status, "CleanedUp").get("reason")
        assert not is_due or reason in ("CleanedUp", "CleanupFailed"), f"{name} is deleted before its clean-up"

    def _claim_is_deleted(self, claim: Object) -> None:
        name, owner = claim["metadata"]["name"], self._owners[_owner_of(claim)]
        assert has(owner, "Succeeded") or is_canceled(owner), f"{name} is deleted before its job has succeeded"
        assert _policy(owner).get("whenFinished") == "Delete", f"{name} is to be retained"

    def _watch(self, kind: str, event: str, body: Object) -> None:
        uid = body["metadata"]["uid"]
        if kind == "persistentvolumeclaims" and event == "ADDED":
            self._claims[_owner_of(body)] = body["metadata"]["name"]
        elif kind in ("qlorajobs", "qlorasweeps"):
            self._owners[uid] = body
            if event == "DELETED":
                self._gone.add(uid)
            if "Delete" in _policy(body).values():
                self._deletes.add(uid)

    def check_claims(self) -> None:
        """A claim exists, or not, by the policy of the job or sweep that it was created for."""
        for uid, name in self._claims.items():
            claim, owner = self._api.get("persistentvolumeclaims", name), self._owners[uid]
            assert claim is not None or uid in self._deletes, f"{name} is gone"
            seen = owner["status"].get("observedGeneration") == owner["metadata"]["generation"]
            if claim is None or "deletionTimestamp" in claim["metadata"] or not seen:
                continue
            when = "whenDeleted" if uid in self._gone else "whenFinished"
            is_over = uid in self._gone or has(owner, "Succeeded") or is_canceled(owner)
            stays = _policy(owner).get(when) != "Delete" or not is_over
            assert stays, f"{name} is there in spite of {when}"

    # --- QLoRAJobs

    def _status_is_written(self, body: Object, status: Object) -> None:
        before, name, uid = body["status"], body["metadata"]["name"], body["metadata"]["uid"]
        assert status != before, f"the status of {name} is written although it is equal"
        assert QLoRAJobStatus.model_validate(status).dump() == status, f"{name} has a status outside the schema"
        self._goes_on(name, before, status, body["spec"])
        self._note_job(uid, status)
        alone = [run for run in self._kubelet.runs.values() if run.uids == (uid,) and run.step != "clean"]
        self._counts_no_more_than_happened(name, status, alone, self._runs(uid, status))
        if self._limit is not None and "currentRevision" in status and not before.get("currentRevision"):
            self._is_within_limit(name)
        _is_consistent(name, status, body["spec"])
        writing = [run for run in self._kubelet.running() if uid in run.uids]
        seen = [run.pod for run in writing if run.uid == (status.get("step") or {}).get("runningPod")]
        assert status["phase"] != "Suspended" or not seen, f"{name} is suspended, and {seen} runs"
        if status["phase"] == "Failed" and _condition(status, "Failed")["reason"] == "BudgetExceeded":
            together = [run.pod for run in writing if len(run.uids) > 1]
            assert not together, f"{name} fails for its budget, and {together} goes on"

    def _goes_on(self, name: str, before: Object, status: Object, spec: Object) -> None:
        """The life of a job goes forward; only a retry after a failure begins a part of it again."""
        for field in _NEVER_LESS:
            assert status.get(field, 0) >= before.get(field, 0), f"{name}: {field} decreases"
        used, was = status.get("usage") or {}, before.get("usage") or {}
        assert _hours(used) >= _hours(was), f"{name} has used less GPU time than before"
        assert before.get("phase") != "Succeeded" or status["phase"] == "Succeeded", f"{name} has succeeded"
        retried = status.get("firstAttempt", 1) > before.get("firstAttempt", 1)
        if before.get("phase") == "Failed":
            assert status["phase"] == "Failed" or _is_retried(before, spec), f"{name} has failed"
        if retried or not before.get("step"):
            return
        assert _place(status) >= _place(before), f"{name} goes back from {_place(before)} to {_place(status)}"
        for field in ("failures", "disruptions"):
            assert status.get(field, 0) >= before.get(field, 0), f"{name}: {field} decrease"

    def _counts_no_more_than_happened(self, name: str, status: Object, runs: list[Run], latest: list[Run]) -> None:
        """`runs`: the pods of the job, or of the shared pod; `latest`: those since its last retry."""
        now = self._agenda.now
        disruptions, failures = (
            sum(run.disrupted for run in latest),
            sum(run.failed or run.stalled(now) for run in latest),
        )
        assert status.get("disruptions", 0) <= disruptions, f"{name} has {disruptions} disruptions"
        assert status.get("failures", 0) <= failures, f"{name} has {failures} failures"
        seconds = sum(run.until(now) - run.begun for run in runs if run.node == 0 and run.begun is not None)
        assert status.get("activeSeconds", 0) <= seconds, f"{name} has run for {seconds} seconds"
        for entry in (status.get("usage") or {}).get("pods", ()):
            _entry_is_true(name, entry, self._kubelet.runs.get(entry["uid"]), now)

    def _note_job(self, uid: str, status: Object) -> None:
        if status.get("step") and status["step"].get("jobUid"):
            self._names.setdefault(uid, set()).add(status["step"]["jobName"])

    def _runs(self, uid: str, status: Object) -> list[Run]:
        """The pods of the job alone since its start, or since its last retry."""
        runs = (run for run in self._kubelet.runs.values() if run.uids == (uid,))
        return [run for run in runs if run.attempt >= status.get("firstAttempt", 1)]

    def _is_within_limit(self, name: str) -> None:
        started = [
            job for job in self._api.all("qlorajobs") if job["status"].get("currentRevision") and not has(job, *_ENDED)
        ]
        assert len(started) < (self._limit or 0), f"{name} starts beside {len(started)} jobs"

    # --- cells

    def _cell_is_made(self, body: Object) -> None:
        name = body["metadata"]["name"]
        sweep = self._api.get("qlorasweeps", controller(body)["name"])
        assert sweep is not None
        assert not sweep["spec"].get("suspend"), f"{name} is created for a suspended sweep"
        lines = {line["name"]: line for line in sweep["status"].get("cells", ())}
        if self._api.get("qlorajobs", name) is None:
            assert not lines.get(name, {}).get("uid"), f"{name} is created a second time"
        if name in lines:
            self._has_a_place(name, list(lines), sweep)

    def _has_a_place(self, name: str, names: list[str], sweep: Object) -> None:
        """A cell of a pod that has begun is created immediately, and another one in a free place."""
        jobs = self._api.owned("qlorajobs", sweep["metadata"]["uid"])
        alive = [names.index(job["metadata"]["name"]) for job in jobs if not has(job, *_ENDED) and _is_in(job, names)]
        pods = {number // sweep["spec"]["cellsPerPod"] for number in alive}
        assert names.index(name) // sweep["spec"]["cellsPerPod"] in pods or len(pods) < sweep["spec"]["parallelism"], (
            f"{name} is created beside the cells {alive}, with parallelism {sweep['spec']['parallelism']}"
        )

    def _sweep_status_is_written(self, body: Object, status: Object) -> None:
        name, before = body["metadata"]["name"], body["status"]
        assert status != before, f"the status of {name} is written although it is equal"
        assert QLoRASweepStatus.model_validate(status).dump() == status, f"{name} has a status outside the schema"
        counts = sum(status[field] for field in ("succeeded", "failed", "stopped", "running", "pending"))
        assert counts == len(status["cells"]), f"{name}: the counts are not those of {len(status['cells'])} cells"
        used, was = (each.get("usage") or {} for each in (status, before))
        assert _hours(used) >= _hours(was), f"{name} has used less GPU time than before"
        earlier = {pod["number"]: pod for pod in before.get("pods", ())}
        for pod in status.get("pods", ()):
            _pod_goes_on(earlier.get(pod["number"], {}), pod)
            self._note_job(body["metadata"]["uid"], pod)
            prefix = f"{sweep_pod_name(name, pod['number'])}-"
            runs = [run for run in self._kubelet.runs.values() if run.job.startswith(prefix)]
            self._counts_no_more_than_happened(prefix, pod, runs, runs)


def _cell_is_changed(before: Object, patch: Object) -> None:
    name, spec = before["metadata"]["name"], patch.get("spec", {})
    after = merged(before["metadata"], patch["metadata"]), merged(before["spec"], spec)
    assert after != (before["metadata"], before["spec"]), f"{name} is changed to what it is"
    if spec.get("suspend") is False:
        marks = before["metadata"].get("annotations") or {}
        assert SUSPENDED_ANNOTATION in marks, f"{name}, which its user has suspended, is resumed"


def _pod_goes_on(before: Object, pod: Object) -> None:
    cells = [cell for part in ("cells", "alone", "waiting") for cell in pod.get(part, ())]
    assert len(set(cells)) == len(cells), f"a cell of {pod} is in two places"
    assert set(before.get("alone", ())) <= set(pod.get("alone", ())), f"a cell of {before} trains no more alone"
    assert pod["step"]["attempt"] >= before.get("step", {}).get("attempt", 0), f"{pod} goes back to an earlier Job"


def _is_consistent(name: str, status: Object, spec: Object) -> None:
    values = {each["type"]: each["status"] for each in status["conditions"]}
    for kind in ("Succeeded", "Failed", "Suspended"):
        assert (values[kind] == "True") == (status["phase"] == kind), f"{name} is {status['phase']}: {kind}"
    ended = status["phase"] in _ENDED
    assert ended == ("completionTime" in status), f"{name} is {status['phase']}: completionTime"
    retry, step = spec.get("retry") or {}, status.get("step") or {}
    most_failures, most_disruptions = retry.get("maxFailures", 3), retry.get("maxDisruptions", 20)
    deadline = spec.get("activeDeadlineSeconds", inf)
    if not ended:
        assert step.get("failures", 0) <= most_failures, f"{name} goes on after {step['failures']} failures"
        exceeds = step.get("countedPod") and status.get("disruptions", 0) > most_disruptions
        assert not exceeds, f"{name} goes on after {status['disruptions']} disruptions"
        assert status.get("activeSeconds", 0) < deadline, f"{name} goes on after {status['activeSeconds']} seconds"
    elif status["phase"] == "Failed" and _condition(status, "Failed")["reason"] == "RetriesExhausted":
        assert status["disruptions"] > most_disruptions, f"{name} fails after {status['disruptions']} disruptions"


def _entry_is_true(name: str, entry: Object, run: Run | None, now: int) -> None:
    """The entry of a pod has no second that the pod had not, and ends as the pod did."""
    assert run is not None, f"{name} counts a pod {entry['name']} that never was"
    had = run.until(now) - run.scheduled
    assert entry["seconds"] <= had, f"{name} counts {entry['seconds']} of the {had} seconds of {run.pod}"
    assert entry.get("end") != "disruption" or run.disrupted or run.nodes > 1, f"{name}: {run.pod} was not interrupted"
    assert entry.get("end") != "completed" or run.code == 0, f"{name}: {run.pod} has ended with {run.code}"
    assert entry.get("end") != "failure" or run.failed, f"{name}: {run.pod} has not failed"


def _owner_of(claim: Object) -> str:
    """Return the UID of the job or sweep that the claim was created for."""
    labels = claim["metadata"]["labels"]
    return str(labels.get(SWEEP_UID_LABEL) or labels[JOB_UID_LABEL])


def _policy(owner: Object) -> Object:
    spec = owner["spec"].get("template", owner)["spec"]
    return dict(spec["workspace"].get("persistentVolumeClaimRetentionPolicy") or {})


def _is_retried(status: Object, spec: Object) -> bool:
    """Whether the user has asked for a retry after the failure."""
    return not spec.get("cancel") and (spec.get("retry") or {}).get("request") not in (None, status.get("retryRequest"))


def is_canceled(job: Object) -> bool:
    """Whether the job was canceled before it had ended."""
    return has(job, "Failed") and _condition(job["status"], "Failed")["reason"] == "Cancelled"


def cleanup_seconds(job: Object) -> int | None:
    """Return the seconds from the end to the clean-up, None if the job asks for none or has never had a Job."""
    step = job["status"].get("step") or {}
    if not (step.get("jobUid") or step.get("attempt", 1) > 1 or step.get("name", "prepare") != "prepare"):
        return None
    at_once = 0 if is_canceled(job) and not controller(job) else None
    seconds: int | None = job["spec"].get("cleanupAfterSeconds", at_once)
    return seconds


def _place(status: Object) -> tuple[int, int]:
    step = status.get("step") or {"name": "prepare", "attempt": 0}
    return STEPS.index(step["name"]), step["attempt"]


def _hours(usage: Object) -> float:
    return float(usage.get("gpuHours", 0))


def _condition(status: Object, kind: str) -> Any:
    return next((each for each in status.get("conditions", ()) if each["type"] == kind), {})


def _is_in(job: Object, names: list[str]) -> bool:
    return job["metadata"]["name"] in names


def _begins(body: Object, prefix: str) -> bool:
    return str(body["metadata"]["name"]).startswith(prefix)


def _counting(status: Object, prefix: str) -> list[Object]:
    """The pods with such names whose time is not counted to their end."""
    pods = (status.get("usage") or {}).get("pods", ())
    return [entry for entry in pods if "end" not in entry and entry["name"].startswith(prefix)]
