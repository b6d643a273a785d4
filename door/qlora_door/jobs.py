"""Creates, reads and changes the fine-tuning jobs of one user in one namespace."""

import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from qlora_door.errors import ApiError, bad_request, not_found
from qlora_door.files import Files
from qlora_door.job import ENDED, NOTE, PAUSED, PREFIX, Job, Note, job_name, manifest_of, spec_of
from qlora_door.namespace import Namespace
from qlora_door.request import JobRequest, parse_request
from qlora_door.settings import ModelTemplate
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import AlreadyExistsError, NotFoundError

Verb = Literal["cancel", "pause", "resume"]
_CHANGES: Mapping[Verb, Mapping[str, Any]] = {
    "cancel": {"spec": {"cancel": True}},
    "pause": {"spec": {"suspend": True}, "metadata": {"annotations": {PAUSED: "true"}}},
    "resume": {"spec": {"suspend": False}, "metadata": {"annotations": {PAUSED: None}}},
}
_KEY = re.compile(r"[!-~]{1,255}")


class Jobs:
    """The jobs that a door has created. All calls raise ApiError or ClusterError."""

    def __init__(self, namespace: Namespace, files: Files, models: Mapping[str, ModelTemplate]) -> None:
        self._namespace, self._files, self._models = namespace, files, models

    async def create(self, body: bytes, idempotency_key: str | None) -> Job:
        """Create the job of a request, once for all requests with an idempotency key."""
        if idempotency_key is not None and not _KEY.fullmatch(idempotency_key):
            raise bad_request("Idempotency-Key: must be 1 to 255 characters of ASCII without spaces", "Idempotency-Key")
        request = parse_request(body)
        template = self._models.get(request.model)
        if template is None:
            known = ", ".join(self._models)
            raise bad_request(
                f"model: found {request.model[:80]!r}, must be one of: {known}", "model", "model_not_found"
            )
        training = await self._files.source(request.training_file, "training_file")
        validation = request.validation_file
        held_out = await self._files.source(validation, "validation_file") if validation is not None else None
        digest = hashlib.sha256(body).hexdigest()
        name = job_name(self._namespace.user.name, request.suffix, idempotency_key, secrets.token_hex(6))
        spec = spec_of(template.spec, request, training, held_out)
        spec["training"].setdefault("seed", secrets.randbelow(2**31))
        if request.seed is not None:
            spec["training"]["seed"] = request.seed
        try:
            return Job(await self._namespace.create_job(manifest_of(name, spec, _note_of(request, digest))))
        except AlreadyExistsError:
            return await self._repeated(name, digest)

    async def _repeated(self, name: str, digest: str) -> Job:
        job = await self.get(name)
        if job.note.request_sha256 != digest:
            raise ApiError(409, "Idempotency-Key: another request had the same one", code="idempotency_key_in_use")
        return job

    async def get(self, name: str) -> Job:
        """One job."""
        return Job(await self._stored(name))

    async def _stored(self, name: str) -> Object:
        missing = not_found(f"fine-tuning job {name[:80]}")
        if not re.fullmatch(rf"{PREFIX}[-a-z0-9]{{1,39}}", name):
            raise missing
        try:
            stored = await self._namespace.get_job(name)
        except NotFoundError:
            raise missing from None
        if NOTE not in (stored["metadata"].get("annotations") or {}):
            raise missing
        return stored

    async def list(self, metadata: Mapping[str, str]) -> list[Job]:
        """The jobs that have the metadata, the newest first."""
        found = await self._namespace.list_jobs(_readable, label=NOTE)
        jobs = [job for job in found if job is not None and metadata.items() <= (job.note.metadata or {}).items()]
        return sorted(jobs, key=lambda job: (job.created_at, job.name), reverse=True)

    async def change(self, name: str, verb: Verb) -> Job:
        """Cancel, pause or resume a job that has not ended."""
        stored = await self._stored(name)
        job = Job(stored)
        if job.state in ENDED:
            raise bad_request(f"job {name} has ended: it is {job.state}", code="invalid_state")
        return Job(await self._namespace.change_job(stored, _CHANGES[verb]))

    async def delete(self, name: str) -> None:
        """Delete a job. The published files of its adapter stay."""
        await self._namespace.delete_job(await self._stored(name))


def _readable(stored: Object) -> Job | None:
    """Return the job, or None for one that cannot be read: it must not hide the others."""
    try:
        return Job(stored)
    except (ApiError, KeyError):
        return None


def _note_of(request: JobRequest, digest: str) -> Note:
    return Note(
        model=request.model,
        method=request.method_name,
        training_file=request.training_file,
        validation_file=request.validation_file,
        metadata=request.metadata,
        suffix=request.suffix,
        project=request.project,
        learning_rate_multiplier=request.settings.learning_rate_multiplier,
        request_sha256=digest,
    )
