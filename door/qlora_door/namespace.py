"""The calls that the door makes in a namespace, with the rights of its user, and no others."""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_api.spec.job import GROUP, PLURAL, VERSION
from qlora_door.identity import Session
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.api import Api, T
from qlora_operator.kube.errors import UnauthorizedError

_UNFINISHED = ("fieldSelector", "status.phase!=Succeeded,status.phase!=Failed")
_METADATA_ONLY = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
_OBJECT, _LIST = _METADATA_ONLY.format(""), _METADATA_ONLY.format("List")
_MERGE = "application/merge-patch+json"


class Namespace(Api):
    """Calls of one user in one namespace. All raise ClusterError, or ApiError without valid credentials."""

    def __init__(self, session: Session, name: str) -> None:
        # An instance for each request: the lists of one user wait for no other's.
        super().__init__(session.transport)
        self.user, self.name = session.user, name
        self._unauthorized = session.unauthorized
        self._jobs = f"/apis/{GROUP}/{VERSION}/namespaces/{name}/{PLURAL}"
        self._maps = f"/api/v1/namespaces/{name}/configmaps"

    async def get_job(self, name: str) -> Object:
        """One QLoRAJob. Raises NotFoundError."""
        return await self._json("GET", f"{self._jobs}/{name}")

    async def list_jobs(
        self, read: Callable[[Object], T], *, label: str | None = None, is_unfinished: bool = False
    ) -> list[T]:
        """Return `read` of each QLoRAJob, or of those with the label, or that have not ended."""
        selector = [("labelSelector", label)] if label else []
        pages = self._pages(self._jobs, [*selector, *([_UNFINISHED] if is_unfinished else [])], read)
        return [item async for page in pages for item in page.items]

    async def create_job(self, manifest: Object) -> Object:
        """Create a QLoRAJob without unknown fields. Raises AlreadyExistsError or RejectedError."""
        return await self._json("POST", self._jobs, query=[("fieldValidation", "Strict")], body=manifest)

    async def change_job(self, job: Object, change: Mapping[str, Any]) -> Object:
        """Merge a change into a QLoRAJob. Raises ConflictError if it has changed since it was read."""
        metadata = job["metadata"]
        version = {field: metadata[field] for field in ("uid", "resourceVersion")}
        body = {**change, "metadata": {**change.get("metadata", {}), **version}}
        return await self._json("PATCH", f"{self._jobs}/{metadata['name']}", body=body, content_type=_MERGE)

    async def delete_job(self, job: Object) -> None:
        """Delete this very QLoRAJob with its Jobs and pods."""
        await self._delete(f"{self._jobs}/{job['metadata']['name']}", job["metadata"]["uid"])

    async def get_record(self, name: str) -> Object:
        """Metadata of one ConfigMap. Raises NotFoundError."""
        return await self._json("GET", f"{self._maps}/{name}", accept=_OBJECT)

    async def list_records(self, read: Callable[[Object], T], *, label: str) -> list[T]:
        """Return `read` of the metadata of each ConfigMap with the label."""
        pages = self._pages(self._maps, [("labelSelector", label)], read, accept=_LIST)
        return [item async for page in pages for item in page.items]

    async def get_map(self, name: str) -> Object:
        """One ConfigMap. Raises NotFoundError."""
        return await self._json("GET", f"{self._maps}/{name}")

    async def create_map(self, manifest: Object, *, is_trial: bool = False) -> Object:
        """Create a ConfigMap, or only try whether rights and quota allow it."""
        query = [("dryRun", "All")] if is_trial else []
        return await self._json("POST", self._maps, query=query, body=manifest)

    async def delete_map(self, name: str, uid: str, *, is_trial: bool = False) -> None:
        """Delete this very ConfigMap, or only try whether rights allow it."""
        await self._delete(f"{self._maps}/{name}", uid, is_trial=is_trial)

    async def _delete(self, path: str, uid: str, *, is_trial: bool = False) -> None:
        dry_run = ["All"] if is_trial else []
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}, "dryRun": dry_run}
        await self._json("DELETE", path, body={"apiVersion": "v1", "kind": "DeleteOptions", **options})

    async def _request(self, method: str, path: str, **request: Any) -> bytes:
        try:
            return await super()._request(method, path, **request)
        except UnauthorizedError:
            raise self._unauthorized from None
