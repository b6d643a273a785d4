"""Translates between a fine-tuning job of OpenAI's API and a QLoRAJob."""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError

from qlora_api.channel import AdapterName
from qlora_api.schema import ObservedModel
from qlora_api.spec.job import API_VERSION, KIND, MAX_NAME_LENGTH
from qlora_api.status import Phase, QLoRAJobStatus
from qlora_door.errors import ApiError
from qlora_door.request import JobRequest
from qlora_operator.decisions.observed.holds import HOLDS
from qlora_operator.decisions.observed.objects import Object

NOTE = "qlora.dev/openai"
"""Label of the jobs that the door has created, and annotation with their note."""
PAUSED = "qlora.dev/openai-paused"
"""Annotation of a job that was suspended through the door."""
PREFIX, RESULTS_PREFIX, CHECKPOINT_PREFIX = "ftjob-", "file-results-", "ftckpt-"
_MAX_SUFFIX = MAX_NAME_LENGTH - len(PREFIX) - 13

JobState = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")
_STATES: Mapping[Phase, JobState] = {
    "Pending": "validating_files",
    "Preparing": "validating_files",
    "Queued": "queued",
    "Training": "running",
    "Publishing": "running",
    "Succeeded": "succeeded",
    "Failed": "failed",
    # By kubectl, a queue or a sweep: the client library has no word for it, and such a job continues by itself.
    "Suspended": "queued",
}
_WAITS = ("JobLimitReached", *HOLDS)
_PARAMS = {"BadDataset": "training_file", "ModelUnavailable": "model", "DoesNotFit": "model"}


class Note(ObservedModel):
    """The part of a request that the spec has no field for. Users can edit it: no right depends on it."""

    model: str
    method: Literal["supervised", "dpo"] = "supervised"
    training_file: str
    validation_file: str | None = None
    metadata: dict[str, str] | None = None
    suffix: str | None = None
    project: str | None = None
    learning_rate_multiplier: float | None = None
    request_sha256: str = ""
    """Of the request's body, to recognize a repeated one."""


def job_name(user: str, suffix: str | None, idempotency_key: str | None, unique: str) -> str:
    """Return the job's name: of a request with an idempotency key the same each time.

    `unique`: 12 hexadecimal digits.
    """
    if idempotency_key is not None:
        # No part of the request decides it, so that another request with the key is noticed.
        return PREFIX + hashlib.sha256(json.dumps([user, idempotency_key]).encode()).hexdigest()[:24]
    text = re.sub(r"[^a-z0-9]+", "-", (suffix or "").lower()).strip("-")[:_MAX_SUFFIX].strip("-")
    return f"{PREFIX}{text}-{unique}" if text else PREFIX + unique


def spec_of(
    template: Mapping[str, Any], request: JobRequest, training: Mapping[str, str], held_out: Mapping[str, str] | None
) -> dict[str, Any]:
    """Return the spec: the template's, with the files and hyperparameters of the request.

    `training`, `held_out`: source and sha256 of the files.
    """
    dataset = {**(template.get("dataset") or {}), **training, **({"eval": held_out} if held_out else {})}
    spec = {**template, "dataset": dataset, "training": _training(template.get("training") or {}, request)}
    if request.project is not None:
        spec["training"]["reportTo"] = sorted({*spec["training"].get("reportTo", ()), "wandb"})
        output = dict(spec.get("output") or {})
        spec["output"] = {**output, "tracking": {**(output.get("tracking") or {}), "experiment": request.project}}
    return spec


def _training(template: Mapping[str, Any], request: JobRequest) -> dict[str, Any]:
    training, asked = dict(template), request.settings
    if request.method_name == "dpo":
        training["objective"] = "dpo"
        training.pop("trainOn", None)
        if asked.beta is not None:
            training["preference"] = {**training.get("preference", {}), "beta": asked.beta}
    else:
        # OpenAI trains on all answers but those of weight 0.
        training.setdefault("trainOn", "weighted")
    if asked.n_epochs is not None:
        training.pop("maxSteps", None)
        training["epochs"] = asked.n_epochs
    if asked.batch_size is not None:
        for name in ("microBatchSize", "gradientAccumulationSteps", "packing"):
            training.pop(name, None)
        training["batchSize"] = asked.batch_size
    if (factor := asked.learning_rate_multiplier) is not None:
        if "learningRate" in training:
            training["learningRate"] *= factor
        else:
            training["learningRateMultiplier"] = factor
    return training


def manifest_of(name: str, spec: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Return the QLoRAJob to create."""
    annotations = {NOTE: note.model_dump_json(by_alias=True, exclude_none=True)}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "labels": {NOTE: "true"}, "annotations": annotations},
        "spec": spec,
    }


class Job:
    """A QLoRAJob that the door has created, as OpenAI's API shows it."""

    def __init__(self, stored: Object) -> None:
        """Read a stored QLoRAJob. Raises ApiError if its note or status cannot be read."""
        metadata = stored["metadata"]
        self.name, self.namespace = str(metadata["name"]), str(metadata["namespace"])
        self.annotations: Mapping[str, str] = metadata.get("annotations") or {}
        self.created_at = seconds(metadata["creationTimestamp"]) or 0
        self.spec: Mapping[str, Any] = stored["spec"]
        try:
            self.note = Note.model_validate_json(self.annotations[NOTE])
            self.status = QLoRAJobStatus.model_validate(stored.get("status") or {})
        except ValidationError as error:
            raise ApiError(
                501, f"job {self.name} cannot be read: {error.error_count()} problems", code="unreadable"
            ) from None

    @property
    def state(self) -> JobState:
        """The job's status in OpenAI's words: what was requested counts before the operator has acted on it."""
        status, phase = self.status, self.status.phase or "Pending"
        if phase == "Succeeded":
            return "succeeded"
        if self.spec.get("cancel"):
            return "cancelled"
        if phase == "Failed":
            return "failed"
        if self.spec.get("suspend"):
            return "paused" if PAUSED in self.annotations else "queued"
        waits = any(condition.type == "Succeeded" and condition.reason in _WAITS for condition in status.conditions)
        return "queued" if waits else _STATES[phase]

    @property
    def fine_tuned_model(self) -> str | None:
        """The immutable name of the finished adapter, which servers load it by."""
        adapter = self.status.adapter
        if self.state != "succeeded" or adapter is None:
            return None
        return str(AdapterName(namespace=self.namespace, job=self.name, sha256=adapter.sha256))

    @property
    def finished_at(self) -> int | None:
        """Seconds since 1970."""
        return seconds(self.status.completion_time) if self.state in ENDED else None

    @property
    def result_file(self) -> str | None:
        """The name of the file with the losses, once it is complete."""
        return f"{RESULTS_PREFIX}{self.name}" if self.state == "succeeded" and self.status.history else None

    def view(self, now: datetime) -> dict[str, Any]:
        """Return the job as OpenAI's API has it."""
        note, status, state = self.note, self.status, self.state
        used = self._hyperparameters()
        remaining = status.progress.remaining_seconds if status.progress and state == "running" else None
        project = {"type": "wandb", "wandb": {"project": note.project}}
        return {
            "id": self.name,
            "object": "fine_tuning.job",
            "created_at": self.created_at,
            "finished_at": self.finished_at,
            "model": note.model,
            "status": state,
            "fine_tuned_model": self.fine_tuned_model,
            "organization_id": self.namespace,
            "training_file": note.training_file,
            "validation_file": note.validation_file,
            "hyperparameters": {name: value for name, value in used.items() if name != "beta"},
            "method": {"type": note.method, note.method: {"hyperparameters": used}},
            "result_files": [self.result_file] if self.result_file else [],
            "seed": (self.spec.get("training") or {}).get("seed", 0),
            "trained_tokens": self._trained_tokens(),
            "error": self._error(),
            "estimated_finish": int(now.timestamp()) + remaining if remaining is not None else None,
            "integrations": [project] if note.project else [],
            "metadata": note.metadata or {},
        }

    def _hyperparameters(self) -> dict[str, Any]:
        """The values in use: of the spec, else those that prepare chose, else `auto`."""
        training = self.spec.get("training") or {}
        chosen = {choice.name: choice.parsed for choice in self.status.settings or ()}
        used = {**chosen, **training}
        per_step = used.get("batchSize")
        micro, accumulated = used.get("microBatchSize"), used.get("gradientAccumulationSteps")
        if per_step is None and isinstance(micro, int) and isinstance(accumulated, int):
            per_step = micro * accumulated
        found = {
            "n_epochs": used.get("epochs", "auto"),
            "batch_size": per_step or "auto",
            "learning_rate_multiplier": self.note.learning_rate_multiplier or "auto",
        }
        beta = (training.get("preference") or {}).get("beta", "auto")
        return {**found, "beta": beta} if self.note.method == "dpo" else found

    def _trained_tokens(self) -> int | None:
        dataset, progress = self.status.dataset, self.status.progress
        if self.state != "succeeded" or dataset is None or progress is None:
            return None
        return round(dataset.tokens * progress.epoch)

    def _error(self) -> dict[str, Any] | None:
        if self.state != "failed":
            return None
        failed = next((each for each in self.status.conditions if each.type == "Failed"), None)
        reason, message = (failed.reason, failed.message) if failed else ("Unknown", "the job has failed")
        return {"code": reason, "message": message, "param": _PARAMS.get(reason)}


def seconds(text: str | None) -> int | None:
    """Return the seconds since 1970 of a time as RFC 3339 writes it."""
    return int(datetime.fromisoformat(text).astimezone(UTC).timestamp()) if text else None
