"""Invariants at the end of a life: each pod has counted, and once."""

from jsonschema import Draft4Validator

from qlora_api.contract import ExitCode
from qlora_api.crd import structural_schema
from qlora_api.status import QLoRAJobStatus
from qlora_api.status_types import seconds_of
from qlora_api.sweep.status import QLoRASweepStatus
from tests.unit.qlora_operator.simulation.api_server import ApiServer, Object
from tests.unit.qlora_operator.simulation.controllers import has
from tests.unit.qlora_operator.simulation.kubelet import Kubelet, Run

_JOB = Draft4Validator(structural_schema(QLoRAJobStatus, defaults=False))
_SWEEP = Draft4Validator(structural_schema(QLoRASweepStatus, defaults=False))


class Accounts:
    """Compares the counts of each status with what its pods have done."""

    def __init__(self, api: ApiServer, kubelet: Kubelet) -> None:
        self._api, self._kubelet = api, kubelet
        self._suspended: set[str] = set()
        """UIDs of the jobs that were suspended once: what they lost then was lost on purpose."""
        self._seen: set[str] = set()
        """UIDs of the pods that the operator has seen running, by the status of their jobs."""
        self._late: set[str] = set()
        """UIDs of the pods whose end was not shown when their job had failed: they use GPUs, and count for no limit."""
        self._guessed: set[str] = set()
        """UIDs of the pods whose end was counted before it was shown: they were gone when all were read."""
        api.watches.append(self._watch)

    def _watch(self, kind: str, _event: str, body: Object) -> None:
        if kind == "qlorajobs":
            self._seen.add((body["status"].get("step") or {}).get("runningPod", ""))
            if body["spec"].get("suspend"):
                self._suspended.add(body["metadata"]["uid"])
            used = body["status"].get("usage") or {}
            counted = {entry["uid"] for entry in used.get("pods", ()) if "end" in entry}
            self._guessed.update(
                uid for uid in counted & self._kubelet.runs.keys() if self._kubelet.runs[uid].shown is None
            )
            if has(body, "Failed"):
                runs = self._kubelet.runs.values()
                self._late.update(run.uid for run in runs if body["metadata"]["uid"] in run.uids and run.shown is None)

    def check(self) -> None:
        """Compare all."""
        for job in self._api.all("qlorajobs"):
            self._check_job(job)
        for sweep in self._api.all("qlorasweeps"):
            self._check_sweep(sweep)

    def _check_job(self, job: Object) -> None:
        name, uid, status = job["metadata"]["name"], job["metadata"]["uid"], job["status"]
        runs = [run for run in self._kubelet.runs.values() if run.uids == (uid,) and run.step != "clean"]
        known = [run for run in runs if run.is_known and run.shown is not None]
        in_time = [run for run in known if run.uid not in self._late]
        seconds = sum(run.seconds for run in in_time if run.node == 0)
        assert status.get("activeSeconds", 0) >= seconds, f"{name} has run for {seconds} seconds at least"
        now = [run for run in in_time if run.attempt >= status.get("firstAttempt", 1)]
        failures = len({run.job if run.nodes > 1 else run.pod for run in now if run.failed})
        assert status.get("failures", 0) >= failures, f"{name} has failed {failures} times at least"
        if uid not in self._suspended and not job["spec"].get("scheduling", {}).get("queueName"):
            lost = [run for run in self._lost(uid) if run.attempt >= status.get("firstAttempt", 1)]
            assert status.get("disruptions", 0) >= len(lost), f"{name} was interrupted {len(lost)} times at least"
        used = status.get("usage") or {}
        shown = {run.uid: run for run in runs if run.step == "train" and run.shown is not None}
        trained = sum(run.gpu_seconds for run in shown.values())
        assert seconds_of(used.get("gpuHours", "0.00")) >= trained, f"{name} has used {trained} seconds at least"
        for entry in used.get("pods", ()):
            saved = entry["uid"] in shown.keys() - self._guessed and shown[entry["uid"]].code == ExitCode.INTERRUPTED
            assert not (saved and entry.get("lostSeconds")), f"{entry['name']} has lost what it has saved"
        _JOB.validate(status)

    def _lost(self, uid: str) -> list[Run]:
        """Return the pods of the job that were seen running and interrupted, and that others of their Job followed."""
        seen = [run for run in self._kubelet.runs.values() if run.uids == (uid,) and run.uid in self._seen]
        last = {run.job: run for run in seen}
        lost = [run for run in seen if run.disrupted and run.nodes == 1 and run.uid not in self._late]
        # One that has finished in spite of its eviction has lost nothing.
        return [run for run in lost if last[run.job] is not run and not run.is_covered and run.code != 0]

    def _check_sweep(self, sweep: Object) -> None:
        name, status = sweep["metadata"]["name"], sweep["status"]
        cells = {job["metadata"]["uid"] for job in self._api.owned("qlorajobs", sweep["metadata"]["uid"])}
        runs = [run for run in self._kubelet.runs.values() if run.step == "train" and cells.intersection(run.uids)]
        known = sum(run.gpu_seconds for run in runs if run.is_known and run.shown is not None)
        used = seconds_of((status.get("usage") or {}).get("gpuHours", "0.00"))
        # The part of each cell of each pod is cut to a whole second.
        cut = sum(len(run.uids) for run in runs)
        assert used >= known - cut, f"{name} has used {known} seconds at least, and counts {used}"
        _SWEEP.validate(status)
