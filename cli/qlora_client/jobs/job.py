"""A QLoRAJob as users see it: what the API server returned, by name instead of by path."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_api.naming import CELLS_IN_POD_ANNOTATION

_ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Job:
    """One job at one moment."""

    body: Mapping[str, Any]
    """The object, as JSON."""

    @property
    def name(self) -> str:
        """Its name in its namespace."""
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Its namespace."""
        return str(self.body["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        """Differs from that of a deleted job of the same name."""
        return str(self.body["metadata"]["uid"])

    @property
    def run_uid(self) -> str:
        """The UID in the records of its run: another one's, if the job was restored."""
        return str(self.status.get("runUid") or self.uid)

    @property
    def version(self) -> str:
        """The resourceVersion: later changes can be watched from it."""
        return str(self.body["metadata"]["resourceVersion"])

    @property
    def created(self) -> datetime:
        """When it was created, with its time zone."""
        return datetime.fromisoformat(self.body["metadata"]["creationTimestamp"])

    @property
    def spec(self) -> Mapping[str, Any]:
        """The user's spec, with the schema's defaults."""
        return dict(self.body["spec"])

    @property
    def status(self) -> Mapping[str, Any]:
        """The operator's report; empty before it has seen the job."""
        return dict(self.body.get("status") or {})

    @property
    def phase(self) -> str:
        """The phase; Pending before the operator has seen the job."""
        return str(self.status.get("phase") or "Pending")

    @property
    def ended(self) -> bool:
        """Whether it has ended; only a retry starts it again."""
        return self.phase in _ENDED

    @property
    def progress(self) -> Mapping[str, Any]:
        """Step, loss and time left of training; empty before."""
        return self.status.get("progress") or {}

    @property
    def sweep_uid(self) -> str:
        """UID of the sweep that trains it in one pod with other cells; empty if none does."""
        metadata = self.body["metadata"]
        if CELLS_IN_POD_ANNOTATION not in (metadata.get("annotations") or {}):
            return ""
        owners = metadata.get("ownerReferences") or ()
        return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")

    @property
    def gpu_hours(self) -> float | None:
        """Hours with GPUs, times their number; None if the operator does not report them."""
        hours = (self.status.get("usage") or {}).get("gpuHours")
        return None if hours is None else float(hours)

    @property
    def cost(self) -> str | None:
        """The cost of these hours, with the currency; None if the profile has no price."""
        return (self.status.get("usage") or {}).get("cost")

    @property
    def forecast(self) -> Mapping[str, str]:
        """Expected gpuHours of the whole job, and cost if priced, or empty if unknown."""
        return self.status.get("forecast") or {}

    @property
    def budget_hours(self) -> float | None:
        """Return the GPU hours that budget and profile allow, None for no limit."""
        limits = (self.spec.get("budget") or {}).get("gpuHours"), self.status.get("gpuHoursLimit")
        return min((float(hours) for hours in limits if hours is not None), default=None)

    @property
    def recoveries(self) -> int:
        """Attempts that ended in a failure or a disruption and were followed by another."""
        return int(self.status.get("failures", 0)) + int(self.status.get("disruptions", 0))

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the step that has failed; 1 if it has none."""
        if self.phase != "Failed":
            return 0
        return int((self.status.get("lastFailure") or {}).get("exitCode") or 1)

    @property
    def message(self) -> str:
        """The operator's message: why the job waits, runs or has failed."""
        told = {entry["type"]: entry for entry in self.status.get("conditions", ())}
        kind = self.phase if self.phase in ("Failed", "Suspended") else "Succeeded"
        return str(told.get(kind, {}).get("message", ""))
