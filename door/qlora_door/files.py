"""Keeps uploaded files: small ones in ConfigMaps, large ones in a bucket with a ConfigMap as their record."""

import re
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from qlora_api.schema import ObservedModel
from qlora_api.spec.job import QLoRAJobSpec
from qlora_door.bucket import Bucket
from qlora_door.errors import ApiError, bad_request, not_found
from qlora_door.history import results_of
from qlora_door.job import PREFIX, RESULTS_PREFIX, Job, seconds
from qlora_door.namespace import Namespace
from qlora_door.upload import MAX_INLINE_BYTES, Upload
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import ClusterError, NotFoundError

FILE = "qlora.dev/openai-file"
"""Label of the ConfigMaps that are records of files, and annotation with their note."""
FILE_PREFIX = "file-"
_KEY = "data.jsonl"


class _FileNote(ObservedModel):
    """The data of a file that a ConfigMap has no field for. Users can edit it: jobs check the digest anyway."""

    filename: str
    size: int = Field(ge=0, alias="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    in_bucket: bool = False


@dataclass(frozen=True)
class StoredFile:
    """An uploaded file."""

    name: str
    uid: str
    created_at: int
    note: _FileNote

    def view(self) -> dict[str, Any]:
        """Return the file as OpenAI's API has it."""
        return _view(self.name, self.created_at, self.note.filename, self.note.size, "fine-tune")


def _view(name: str, created_at: int, filename: str, size: int, purpose: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "file",
        "bytes": size,
        "created_at": created_at,
        "expires_at": None,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


def _read(record: Object) -> StoredFile | None:
    """Read the record of a file; None if a ConfigMap is none."""
    metadata = record["metadata"]
    try:
        note = _FileNote.model_validate_json((metadata.get("annotations") or {})[FILE])
    except (KeyError, ValidationError):
        return None
    return StoredFile(metadata["name"], metadata["uid"], seconds(metadata["creationTimestamp"]) or 0, note)


class Files:
    """The files of one user in one namespace. All calls raise ApiError or ClusterError."""

    def __init__(self, namespace: Namespace, bucket: Bucket | None) -> None:
        self._namespace, self._bucket = namespace, bucket

    async def create(self, upload: Upload) -> StoredFile:
        """Keep the file that arrives."""
        name = FILE_PREFIX + secrets.token_hex(12)
        # Before anything is read or written: whether the user may.
        await self._namespace.create_map(_record(name, "trial", 0, "0" * 64), is_trial=True)
        start = await upload.start()
        if start.is_complete:
            record = _record(name, start.name, upload.size, upload.sha256)
            content = {"data": {_KEY: start.content.decode("utf-8")}}
            return self._created(await self._namespace.create_map({**record, **content}))
        if self._bucket is None:
            message = f"file: it has more than {MAX_INLINE_BYTES} bytes, and the administrator has set no bucket"
            raise ApiError(413, message, param="file")
        await self._bucket.write(self._namespace.name, name, upload.chunks(start))
        try:
            record = _record(name, start.name, upload.size, upload.sha256, in_bucket=True)
            return self._created(await self._namespace.create_map(record))
        except (ClusterError, ApiError):
            # Unless only the answer was lost: the record may exist.
            if await self._is_missing(name):
                await self._bucket.delete(self._namespace.name, name)
            raise

    def _created(self, record: Object) -> StoredFile:
        created = _read(record)
        if created is None:
            raise ApiError(500, "another program has changed the file's record while it was created")
        return created

    async def _is_missing(self, name: str) -> bool:
        try:
            await self._namespace.get_record(name)
        except NotFoundError:
            return True
        except (ClusterError, ApiError):
            return False
        return False

    async def get(self, name: str) -> StoredFile:
        """One uploaded file."""
        try:
            found = _read(await self._namespace.get_record(_valid(name)))
        except NotFoundError:
            found = None
        if found is None:
            raise not_found(f"file {name}")
        return found

    async def list(self) -> list[StoredFile]:
        """All uploaded files, the newest first."""
        found = await self._namespace.list_records(_read, label=FILE)
        files = [each for each in found if each is not None]
        return sorted(files, key=lambda each: (each.created_at, each.name), reverse=True)

    async def source(self, name: str, param: str) -> dict[str, str]:
        """Return address and digest of a file for a job."""
        try:
            file = await self.get(name)
        except ApiError as problem:
            if problem.status != 404:
                raise
            raise bad_request(f"{param}: file {name} was not found", param, "file_not_found") from None
        if not file.note.in_bucket:
            address = f"configMap://{file.name}/{_KEY}"
        else:
            address = self._in_bucket().address_of(self._namespace.name, file.name)
        return {"source": address, "sha256": file.note.sha256}

    async def content(self, name: str) -> AsyncIterator[bytes]:
        """Yield the content of an uploaded file."""
        file = await self.get(name)
        if file.note.in_bucket:
            async for chunk in self._in_bucket().read(self._namespace.name, file.name):
                yield chunk
        else:
            stored = await self._namespace.get_map(file.name)
            yield str((stored.get("data") or {}).get(_KEY, "")).encode()

    async def delete(self, name: str) -> None:
        """Delete a file, unless a job reads it that has neither ended nor been canceled."""
        file = await self.get(name)
        for job, addresses in await self._namespace.list_jobs(_addresses, is_unfinished=True):
            if any(file.name in address for address in addresses):
                message = f"job {job} reads file {file.name}: cancel it, or wait until it has ended"
                raise ApiError(409, message, code="file_in_use")
        if file.note.in_bucket:
            # The object first, so that none stays without a record; before it, whether the user may.
            await self._namespace.delete_map(file.name, file.uid, is_trial=True)
            await self._in_bucket().delete(self._namespace.name, file.name)
        await self._namespace.delete_map(file.name, file.uid)

    def _in_bucket(self) -> Bucket:
        if self._bucket is None:
            raise ApiError(501, "the file is in a bucket that the administrator has removed from the door's settings")
        return self._bucket

    async def results(self, name: str) -> tuple[dict[str, Any], bytes]:
        """Return the file of a job's losses, as OpenAI's API has it, and its content."""
        missing = not_found(f"file {name}")
        job_name = name.removeprefix(RESULTS_PREFIX)
        if not job_name.startswith(PREFIX):
            raise missing
        try:
            job = Job(await self._namespace.get_job(_valid(job_name)))
        except NotFoundError:
            raise missing from None
        if job.result_file != name:
            raise missing
        content = results_of(job).encode()
        view = _view(name, job.finished_at or job.created_at, "step_metrics.csv", len(content), "fine-tune-results")
        return view, content


def _record(name: str, filename: str, size: int, sha256: str, *, in_bucket: bool = False) -> dict[str, Any]:
    note = _FileNote(filename=filename, size=size, sha256=sha256, in_bucket=in_bucket)
    annotations = {FILE: note.model_dump_json(by_alias=True, exclude_none=True)}
    metadata = {"name": name, "labels": {FILE: "true"}, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True}


def _valid(name: str) -> str:
    """Check the name of an object. Raises ApiError, as one that is no name exists nowhere."""
    if not re.fullmatch(r"[a-z0-9][-a-z0-9]{0,62}", name):
        raise not_found(f"{name[:80]!r}")
    return name


def _addresses(job: Object) -> tuple[str, list[str]]:
    """Return a job's name, and the addresses in its spec that data may still be read from."""
    spec: Mapping[str, Any] = job["spec"]
    if spec.get("cancel"):
        return job["metadata"]["name"], []
    try:
        found = list(QLoRAJobSpec.model_validate(spec).data_addresses.values())
    except ValidationError:
        # Of another release: whatever names the file counts.
        found = [str(spec)]
    return job["metadata"]["name"], found
