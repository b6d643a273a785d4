"""The nodes: pods that run, train, report, stop and vanish, and what each has really done."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

from qlora_api.contract import CONTINUED_MOUNT, WORKSPACE_MOUNT, ExitCode, ProgressRecord, ResultRecord, encode_record
from qlora_api.naming import SPEC_ANNOTATION, STEP_LABEL
from qlora_api.status import StepName
from tests.support.builders import FACTS
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer, Object, controller
from tests.unit.qlora_operator.simulation.controllers import ENDS, has, node_of, over

PROGRESS_DEADLINE = 60
_KILLED = 137
_SECONDS = {"prepare": (2, 9), "train": (4, 12, 40), "publish": (2, 9), "clean": (1,)}
"""For how long a pod may run."""


@dataclass(eq=False)
class Run:
    """One pod from its node to its end."""

    pod: str
    uid: str
    job: str
    step: StepName
    folders: tuple[str, ...]
    uids: tuple[str, ...]
    """The QLoRAJobs that it trains, the first first."""
    scheduled: int
    gpus: int
    node: int
    nodes: int
    begun: int | None = None
    ended: int | None = None
    code: int | None = None
    """None for a pod that has vanished."""
    asked: int | None = None
    """When it was asked to stop."""
    shown: int | None = None
    """When a watch has shown its end."""
    is_known: bool = False
    """Whether its Job has ended after it, and so was there to show it: only then its failure surely counts."""
    is_covered: bool = False
    """Whether a user has deleted its Job before an interruption of it was counted."""
    hangs: bool = False
    disrupted: bool = False
    """Whether it was stopped from outside, and not by its Job."""

    @property
    def is_running(self) -> bool:
        return self.begun is not None and self.ended is None

    @property
    def seconds(self) -> int:
        """For how long its trainer has run."""
        return (self.ended or 0) - (self.begun or 0)

    @property
    def gpu_seconds(self) -> int:
        """The same of its GPUs, since it has had them."""
        return self.gpus * ((self.ended or 0) - self.scheduled)

    @property
    def attempt(self) -> int:
        """The number of its Job."""
        return int(self.job.rpartition("-")[2])

    @property
    def failed(self) -> bool:
        """Whether its trainer failed by itself."""
        if self.code == _KILLED:
            return self.asked is None
        return self.code not in (None, 0, ExitCode.INTERRUPTED, ExitCode.PEER_LOST)

    def until(self, now: int) -> int:
        """Return the latest second that may count.

        The last words of a pod of a sweep whose Job is deleted may come too late: a sweep reads the present state.
        """
        return self.shown if self.shown is not None and (self.is_known or len(self.uids) == 1) else now

    def stalled(self, now: int) -> bool:
        """Whether it made no progress for the time that a job allows, and was not asked to stop by then."""
        until = min(each for each in (now, self.ended, self.asked) if each is not None)
        return self.hangs and self.begun is not None and until - self.begun >= PROGRESS_DEADLINE


class Kubelet:
    """Runs the pods of all nodes."""

    def __init__(self, api: ApiServer, agenda: Agenda) -> None:
        self.runs: dict[str, Run] = {}
        """By the UID of the pod."""
        self.failing: list[int] = []
        """Exit codes of the next pods, in order."""
        self.hanging = False
        """Whether the next train pod makes no progress."""
        self._trained: set[str] = set()
        self._api, self._agenda = api, agenda
        api.watches.append(self._watch)
        api.logs = self._log

    def running(self) -> list[Run]:
        """The pods whose trainer runs now."""
        return [run for run in self.runs.values() if run.is_running]

    def _watch(self, kind: str, event: str, body: Object) -> None:
        if kind == "jobs" and event == "MODIFIED" and has(body, *ENDS):
            for run in self.runs.values():
                run.is_known |= run.job == body["metadata"]["name"] and run.code is not None and run.asked is None
        elif kind == "pods" and event == "ADDED":
            self._later((0, 0, 1, 5), partial(self._schedule, body["metadata"]["uid"], body["metadata"]["name"]))
        elif kind == "pods" and event == "MODIFIED" and "deletionTimestamp" in body["metadata"] and not over(body):
            self._stop(body)

    def _later(self, seconds: tuple[int, ...], event: Callable[[], None]) -> None:
        self._agenda.add(self._agenda.random.choice(seconds), event)

    def _stop(self, pod: Object) -> None:
        """A pod that was deleted saves a checkpoint and ends, or is killed."""
        run = self.runs.get(pod["metadata"]["uid"])
        if run is None or run.begun is None:
            self._later((0, 0, 1, 5), partial(self._vanish, pod))
        elif run.asked is None:
            run.asked = self._agenda.now
            grace = (pod["metadata"]["deletionGracePeriodSeconds"],)
            code = _KILLED if run.hangs else ExitCode.INTERRUPTED
            self._later(grace if run.hangs else (0, 1, 5, 25), partial(self._end, run, code))

    def _vanish(self, pod: Object) -> None:
        """A pod that has not begun is removed."""
        if run := self.runs.get(pod["metadata"]["uid"]):
            run.ended = self._agenda.now
        self._remove(pod)

    def _remove(self, pod: Object) -> None:
        if self._pod(pod["metadata"]["name"], pod["metadata"]["uid"]) is not None:
            self._api.remove("pods", pod["metadata"]["name"])

    def _pod(self, name: str, uid: str) -> Object | None:
        pod = self._api.get("pods", name)
        return pod if pod is not None and pod["metadata"]["uid"] == uid else None

    def _schedule(self, uid: str, name: str) -> None:
        pod = self._pod(name, uid)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return
        job = self._api.get("jobs", controller(pod)["name"])
        run = self.runs[uid] = _run(pod, self._agenda.now, 1 if job is None else job["spec"]["completions"])
        known = {"type": "PodScheduled", "status": "True", "lastTransitionTime": self._agenda.stamp()}
        self._api.change("pods", name, status={**pod["status"], "conditions": [known]})
        self._later((0, 1, 3), partial(self._begin, run))

    def _begin(self, run: Run) -> None:
        pod = self._pod(run.pod, run.uid)
        if pod is None or "deletionTimestamp" in pod["metadata"] or run.ended is not None:
            return
        run.begun = self._agenda.now
        self._report(pod, "Running", {"running": {"startedAt": self._agenda.stamp()}})
        # One that replaces a pod of a finished run waits for no other.
        if len(self._fellows(run)) == run.nodes or self._trained.issuperset(run.folders):
            self._train(run)

    def _train(self, run: Run) -> None:
        """All pods of the attempt run: decide how it goes."""
        if run.step == "train" and self._trained.issuperset(run.folders):
            self._agenda.add(1, partial(self._end_all, run, 0))
            return
        run.hangs, self.hanging = self.hanging and run.step == "train", self.hanging and run.step != "train"
        if not run.hangs:
            code = self.failing.pop(0) if self.failing else 0
            self._later(_SECONDS[run.step], partial(self._end_all, run, code))

    def _fellows(self, run: Run) -> list[Run]:
        """The pods of the same attempt that run, itself among them."""
        return [each for each in self.running() if each.job == run.job]

    def _end_all(self, run: Run, code: int) -> None:
        for each in [run] if code else self._fellows(run):
            self._end(each, code)

    def _end(self, run: Run, code: int) -> None:
        """The trainer ends, with its record; the pods of other nodes notice a failure."""
        pod = self._pod(run.pod, run.uid)
        if pod is None or not run.is_running:
            return
        fellows, run.ended, run.code = self._fellows(run), self._agenda.now, code
        run.disrupted |= code == ExitCode.PEER_LOST
        if code == 0 and run.step == "train":
            self._trained.update(run.folders)
        state = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": encode_record(self._result(run, code)) if code != _KILLED else "",
            "startedAt": self._agenda.stamp(-run.seconds),
            "finishedAt": self._agenda.stamp(),
        }
        self._report(pod, "Failed" if code else "Succeeded", {"terminated": state})
        if "deletionTimestamp" in pod["metadata"]:
            self._agenda.soon(partial(self._remove, pod))
        if code:
            self._lose_peer(run, fellows)

    def _lose_peer(self, run: Run, fellows: list[Run]) -> None:
        for each in fellows:
            if each is not run and each.asked is None:
                self._agenda.add(3, partial(self._end, each, ExitCode.PEER_LOST))

    def lose(self, run: Run) -> Object | None:
        """Return the pod that vanishes with its node, or None if it is gone."""
        pod = self._pod(run.pod, run.uid)
        if pod is not None:
            fellows, run.ended, run.disrupted = self._fellows(run), self._agenda.now, True
            self._api.remove("pods", run.pod)
            self._lose_peer(run, fellows)
        return pod

    def calm_down(self) -> None:
        """End the pods that hang, and let no other fail or hang."""
        self.failing, self.hanging = [], False
        for run in self.running():
            if run.hangs:
                self._agenda.add(1, partial(self._end, run, ExitCode.INTERNAL_ERROR))

    def _report(self, pod: Object, phase: str, state: Object) -> None:
        status = {**pod["status"], "phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
        self._api.change("pods", pod["metadata"]["name"], status=status)

    def _result(self, run: Run, code: int) -> ResultRecord:
        facts = FACTS.get(run.step, {}) if code == 0 else {}
        if run.step == "train" and code == 0:
            facts = facts | {"eval_loss": 1 + int(run.uids[0][:8], 16) % 7 / 10}
        if run.step == "train" and code != ExitCode.PEER_LOST:
            facts = facts | {"training_since": self._agenda.stamp(-run.seconds)}
        return ResultRecord(
            job_uid=run.uids[0],
            pod_uid=run.uid,
            step=run.step,
            time=self._agenda.stamp(),
            outcome="failed" if code not in (0, ExitCode.INTERRUPTED) else "interrupted" if code else "succeeded",
            exit_code=code,
            reason="Done",
            **facts,
        )

    def _log(self, pod: Object) -> str | None:
        run = self.runs.get(pod["metadata"]["uid"])
        if run is None or run.begun is None or run.ended is not None:
            return None
        ran = self._agenda.now - run.begun
        done, begun = 0 if run.hangs else ran // 10, self._agenda.stamp(-ran)
        figures = {"training_since": begun, "remaining_seconds": 60.0} if run.step == "train" else {}
        records = (
            ProgressRecord(
                job_uid=uid,
                pod_uid=run.uid,
                step=run.step,
                time=self._agenda.stamp(10 * done - ran),
                activity="training",
                training_step=done,
                total_steps=10,
                **figures,
            )
            for uid in run.uids
        )
        return "\n".join(map(encode_record, records))


def _run(pod: Object, now: int, nodes: int) -> Run:
    (container,) = pod["spec"]["containers"]
    words, notes = container["args"], pod["metadata"]["annotations"]
    folders = [words[words.index("--workspace") + 1]]
    folders += [words[place + 2] for place, word in enumerate(words) if word == "--with"]
    others = [text for key, text in notes.items() if key.startswith(f"{SPEC_ANNOTATION}-of-")]
    return Run(
        pod=pod["metadata"]["name"],
        uid=pod["metadata"]["uid"],
        job=controller(pod)["name"],
        step=pod["metadata"]["labels"][STEP_LABEL],
        folders=tuple(PurePosixPath(folder).relative_to(WORKSPACE_MOUNT).as_posix() for folder in folders),
        uids=tuple(json.loads(text)["metadata"]["uid"] for text in (notes[SPEC_ANNOTATION], *others)),
        scheduled=now,
        gpus=int(container["resources"]["limits"].get("nvidia.com/gpu", 0)),
        node=node_of(pod),
        nodes=nodes,
    )


def read_folder(pod: Object) -> str:
    """Return the folder of another job that the pod reads, empty for none."""
    (container,) = pod["containers"]
    mounts = (each for each in container["volumeMounts"] if each["mountPath"] == str(CONTINUED_MOUNT))
    return str(next((mount["subPath"] for mount in mounts), ""))
