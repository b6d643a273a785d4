"""Calls the API server.

Input and output are plain objects. Every call has a timeout and raises a ClusterError whose class selects the reaction:
wait, read again or report.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import aiohttp

from qlora_api.contract import TRAINER_CONTAINER
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, SWEEP_UID_LABEL
from qlora_api.profile import PROFILE_KIND, PROFILE_PLURAL
from qlora_api.spec.job import API_VERSION, GROUP, KIND, PLURAL, VERSION
from qlora_api.sweep.spec import SWEEP_KIND, SWEEP_PLURAL
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.observed.parsing import profile_in_use
from qlora_operator.decisions.profiles.stored_profile import StoredProfile
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, StoredSweep, parse_cell
from qlora_operator.kube.api import Api
from qlora_operator.kube.errors import (
    ClusterError,
    ConflictError,
    NotFoundError,
)
from qlora_operator.kube.listing import (
    VERSIONS_PER_PAGE,
    ChildKind,
    ChildList,
    ChildView,
    Kind,
    ObjectVersion,
    as_revision,
    child_view,
    compact,
    object_version,
    parse_versions,
    unfinished_of_earlier,
)
from qlora_operator.kube.transport import (
    Query,
)

logger = logging.getLogger(__name__)

FIELD_MANAGER = "qlora-operator"
_APPLY, _APPLIED = "application/apply-patch+yaml", [("fieldManager", FIELD_MANAGER), ("force", "true")]
# For what only explains. A log comes from a node through the API server, a Workload perhaps through a webhook: a slow
# one is not worth waiting for.
_BRIEF_TIMEOUT = aiohttp.ClientTimeout(total=5, connect=5)
_TAIL_LINES = 40
_TAIL_BYTES = 64 * 1024


_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
_VERSIONS: dict[str, Any] = {"accept": _METADATA_ONLY, "parse": parse_versions, "longest": VERSIONS_PER_PAGE}
"""How to list versions or names of many objects."""

_JOBS = "/apis/batch/v1"
_APPS = "/apis/apps/v1"
_CORE = "/api/v1"
_NETWORKING = "/apis/networking.k8s.io/v1"
_LEASES = "/apis/coordination.k8s.io/v1"
_QLORA = f"/apis/{GROUP}/{VERSION}"
_KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
_CONTROLLER_UID = "batch.kubernetes.io/controller-uid"
_WORKLOAD_JOB_UID = "kueue.x-k8s.io/job-uid"
_UNFINISHED = "status.phase!=Succeeded,status.phase!=Failed"


class Cluster(Api):
    """The calls that the operator makes, and no others. All raise ClusterError."""

    async def get_qlora_job(self, namespace: str, name: str) -> Object | None:
        """Return the stored QLoRAJob without unused metadata, or None if absent."""
        try:
            return compact(await self._json("GET", f"{_QLORA}/namespaces/{namespace}/{PLURAL}/{name}"))
        except NotFoundError:
            return None

    async def profiles_in_use(self, namespace: str) -> AsyncIterator[Sequence[str | None]]:
        """Yield `profile_in_use` of each unfinished QLoRAJob of the namespace, in pages."""
        # The API server leaves out the others, perhaps thousands.
        selector = [("fieldSelector", _UNFINISHED)]
        async for page in self._pages(f"{_QLORA}/namespaces/{namespace}/{PLURAL}", selector, profile_in_use):
            yield page.items

    async def list_jobs(self, namespace: str, job_uid: str) -> ChildList:
        """The Jobs that have the label of this QLoRAJob."""
        path, read = f"{_JOBS}/namespaces/{namespace}/jobs", partial(child_view, "jobs")
        return await self._children(path, _labelled(JOB_UID_LABEL, job_uid), read)

    async def list_pods(self, namespace: str, job_uid: str) -> ChildList:
        """The pods that have the label of this QLoRAJob."""
        return await self._list_pods(namespace, _labelled(JOB_UID_LABEL, job_uid))

    async def list_unfinished_of_earlier(self, namespace: str, job_name: str, uid: str) -> list[str]:
        """Name pods and Jobs that have not ended, of QLoRAJobs of that name and another UID."""
        found = list[str]()
        # The Jobs afterwards: one that has not ended may have made a pod in between.
        kinds: tuple[tuple[ChildKind, str], ...] = (("pods", _CORE), ("jobs", _JOBS))
        for kind, prefix in kinds:
            path, read = f"{prefix}/namespaces/{namespace}/{kind}", partial(unfinished_of_earlier, kind, job_name, uid)
            async for page in self._pages(path, _labelled(JOB_LABEL, job_name), read):
                found += [name for name in page.items if name is not None]
        return found

    async def list_pods_of_child(self, namespace: str, child_uid: str) -> Sequence[ChildView]:
        """The pods that have the Job controller's label for the Job of that UID."""
        return (await self._list_pods(namespace, _labelled(_CONTROLLER_UID, child_uid))).items

    async def list_pods_named(self, namespace: str, name: str) -> Sequence[ChildView]:
        """Return the pod of that name, if any, whatever its labels are.

        This needs no right to get pods.
        """
        return (await self._list_pods(namespace, [("fieldSelector", f"metadata.name={name}")])).items

    async def find_workload(self, namespace: str, child_uid: str) -> Object | None:
        """Return Kueue's Workload of the Job of that UID, the first of several.

        Raises NotFoundError without Kueue. It waits for no other list, and none waits for it: a webhook may keep it
        waiting.
        """
        query = [("limit", "1"), *_labelled(_WORKLOAD_JOB_UID, child_uid)]
        path = f"{_KUEUE}/namespaces/{namespace}/workloads"
        page = await self._json("GET", path, query=query, timeout=_BRIEF_TIMEOUT)
        return next(iter(page.get("items") or ()), None)

    async def list_versions(self, kind: Kind, namespace: str | None) -> tuple[list[ObjectVersion], str]:
        """List all QLoRAJobs, or the operator's Jobs or pods, with the list's version.

        `namespace`: None for all.
        """
        found: list[ObjectVersion] = []
        version = ""
        read, where = partial(object_version, kind), _watched(kind, namespace)
        async for page in self._pages(*where, read, **_VERSIONS):
            found += page.items
            version = version or page.version
        return found, version

    async def check_list(self, kind: Kind, namespace: str | None) -> None:
        """List one object of the kind, to check connection and rights.

        Raises RejectedError if that is no longer allowed.
        """
        path, selector = _watched(kind, namespace)
        await self._json("GET", path, query=[("limit", "1"), *selector], accept=_METADATA_ONLY)

    async def create_job(self, namespace: str, manifest: Object) -> Object:
        """Create a Job. Raises AlreadyExistsError or RejectedError."""
        return await self._json("POST", f"{_JOBS}/namespaces/{namespace}/jobs", body=manifest)

    async def try_job(self, namespace: str, manifest: Object) -> Object:
        """Return the Job as the API server and its webhooks would make it, without creating it.

        Raises as `create_job` does.
        """
        query = [("dryRun", "All")]
        return await self._json("POST", f"{_JOBS}/namespaces/{namespace}/jobs", query=query, body=manifest)

    async def get_job(self, namespace: str, name: str) -> Object:
        """One Job. Raises NotFoundError."""
        return await self._json("GET", f"{_JOBS}/namespaces/{namespace}/jobs/{name}")

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete this very Job and, in the background, its pods.

        The default for Jobs would orphan the pods.
        """
        try:
            await self._delete(f"{_JOBS}/namespaces/{namespace}/jobs/{name}", {"uid": uid})
        except (NotFoundError, ConflictError):
            logger.debug("Job %s is already gone", name, extra={"key": (namespace, name)})

    async def delete_qlora_job(self, job: QLoRAJob) -> None:
        """Delete the job with its Jobs and pods.

        Raises ConflictError if it has changed since it was read, and NotFoundError.
        """
        version = {"uid": job.uid, "resourceVersion": job.resource_version}
        await self._delete(f"{_QLORA}/namespaces/{job.namespace}/{PLURAL}/{job.name}", version)

    async def delete_sweep(self, sweep: QLoRASweep) -> None:
        """Delete the sweep with its cells. Raises as `delete_qlora_job` does."""
        version = {"uid": sweep.uid, "resourceVersion": sweep.resource_version}
        await self._delete(f"{_QLORA}/namespaces/{sweep.namespace}/{SWEEP_PLURAL}/{sweep.name}", version)

    async def _delete(self, path: str, preconditions: Object) -> None:
        """Delete this very object and, in the background, what it owns."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": preconditions,
        }
        await self._json("DELETE", path, body=options)

    async def list_revisions(self, namespace: str, job_name: str) -> list[Object]:
        """The ControllerRevisions that have the label of a QLoRAJob of that name."""
        path = f"{_APPS}/namespaces/{namespace}/controllerrevisions"
        pages = self._pages(path, _labelled(JOB_LABEL, job_name), as_revision)
        return [body async for page in pages for body in page.items]

    async def get_revision(self, namespace: str, name: str) -> Object:
        """One ControllerRevision. Raises NotFoundError."""
        path = f"{_APPS}/namespaces/{namespace}/controllerrevisions/{name}"
        return as_revision(await self._json("GET", path))

    async def create_revision(self, namespace: str, manifest: Object) -> None:
        """Create a ControllerRevision. Raises AlreadyExistsError or RejectedError."""
        await self._request("POST", f"{_APPS}/namespaces/{namespace}/controllerrevisions", body=manifest)

    async def adopt_revision(self, namespace: str, name: str, version: str, owner: Object) -> Object:
        """Give a ControllerRevision its owner and the label of that.

        Raises ConflictError if it has changed since that version, and RejectedError.
        """
        path = f"{_APPS}/namespaces/{namespace}/controllerrevisions/{name}"
        labels = {JOB_UID_LABEL: owner["uid"]}
        change = {"metadata": {"resourceVersion": version, "labels": labels, "ownerReferences": [owner]}}
        return as_revision(await self._json("PATCH", path, body=change, content_type="application/merge-patch+json"))

    async def create_claim(self, namespace: str, manifest: Object) -> None:
        """Create a PersistentVolumeClaim. Raises AlreadyExistsError if the name is taken."""
        await self._request("POST", f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims", body=manifest)

    async def get_claim(self, namespace: str, name: str) -> Object:
        """One PersistentVolumeClaim. Raises NotFoundError."""
        return await self._json("GET", f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims/{name}")

    async def change_claim_owners(self, namespace: str, claim: Object, owners: Sequence[Object]) -> None:
        """Replace the claim's owners. Raises ConflictError if it has changed."""
        metadata = claim["metadata"]
        version = {field: metadata[field] for field in ("uid", "resourceVersion")}
        path = f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims/{metadata['name']}"
        change = {"metadata": {**version, "ownerReferences": list(owners)}}
        await self._request("PATCH", path, body=change, content_type="application/merge-patch+json")

    async def delete_claim(self, namespace: str, claim: Object) -> None:
        """Delete this very claim, which Kubernetes does when no pod uses it.

        Raises NotFoundError.
        """
        metadata = claim["metadata"]
        path = f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims/{metadata['name']}"
        await self._delete(path, {"uid": metadata["uid"]})

    async def create_service(self, namespace: str, manifest: Object) -> None:
        """Create a Service. Raises AlreadyExistsError or RejectedError."""
        await self._request("POST", f"{_CORE}/namespaces/{namespace}/services", body=manifest)

    async def apply_network_policy(self, namespace: str, manifest: Object) -> None:
        """Create a NetworkPolicy, or give it these rules again. Raises RejectedError."""
        await self._request(
            "PATCH",
            f"{_NETWORKING}/namespaces/{namespace}/networkpolicies/{manifest['metadata']['name']}",
            query=_APPLIED,
            body=manifest,
            content_type=_APPLY,
        )

    async def create_config_map(self, namespace: str, manifest: Object) -> None:
        """Create a ConfigMap. Raises as `create_service` does."""
        await self._request("POST", f"{_CORE}/namespaces/{namespace}/configmaps", body=manifest)

    async def patch_config_map(self, namespace: str, name: str, patch: Sequence[Object]) -> None:
        """Apply a JSON Patch to a ConfigMap. Raises RejectedError if a test fails."""
        path = f"{_CORE}/namespaces/{namespace}/configmaps/{name}"
        await self._request("PATCH", path, body=patch, content_type="application/json-patch+json")

    async def create_event(self, namespace: str, manifest: Object) -> None:
        """Create an Event. Raises AlreadyExistsError."""
        await self._request("POST", f"{_CORE}/namespaces/{namespace}/events", body=manifest)

    async def apply_status(self, job: QLoRAJob, status: Object) -> Object:
        """Replace the job's status by server-side apply, and return the job as it is then.

        The operator is the only writer of the status. Raises ConflictError if the job has changed since it was read, or
        is another one of the same name.
        """
        return await self._apply_status(KIND, f"/namespaces/{job.namespace}/{PLURAL}", job, status)

    async def get_sweep(self, namespace: str, name: str) -> Object | None:
        """Return the stored QLoRASweep, or None if it does not exist."""
        try:
            return await self._json("GET", f"{_QLORA}/namespaces/{namespace}/{SWEEP_PLURAL}/{name}")
        except NotFoundError:
            return None

    async def sweep_names(self, namespace: str | None) -> list[tuple[str, str]]:
        """Namespace and name of each QLoRASweep in one namespace or in all (None)."""
        where = f"/namespaces/{namespace}" if namespace else ""
        path = f"{_QLORA}{where}/{SWEEP_PLURAL}"
        pages = self._pages(path, [], _name_of, **_VERSIONS)
        return [name async for page in pages for name in page.items]

    async def sweep_uids(self, namespace: str) -> set[str]:
        """UID of each QLoRASweep in the namespace."""
        pages = self._pages(f"{_QLORA}/namespaces/{namespace}/{SWEEP_PLURAL}", [], _uid_of, accept=_METADATA_ONLY)
        return {uid async for page in pages for uid in page.items}

    async def list_cells(self, namespace: str, sweep_uid: str) -> list[CellJob]:
        """List the QLoRAJobs that have the sweep's label and controller, as stored now."""
        read = partial(parse_cell, sweep_uid=sweep_uid)
        pages = self._pages(f"{_QLORA}/namespaces/{namespace}/{PLURAL}", _labelled(SWEEP_UID_LABEL, sweep_uid), read)
        return [cell async for page in pages for cell in page.items if cell is not None]

    async def get_cell(self, namespace: str, name: str) -> Object:
        """One QLoRAJob as stored now. Raises NotFoundError."""
        return await self._json("GET", f"{_QLORA}/namespaces/{namespace}/{PLURAL}/{name}")

    async def create_cell(self, namespace: str, manifest: Object) -> Object:
        """Create a QLoRAJob. Raises AlreadyExistsError or RejectedError."""
        return await self._json("POST", f"{_QLORA}/namespaces/{namespace}/{PLURAL}", body=manifest)

    async def change_cell(self, namespace: str, name: str, change: Object) -> Object:
        """Merge the change into a QLoRAJob. Raises ConflictError for another UID or version."""
        path = f"{_QLORA}/namespaces/{namespace}/{PLURAL}/{name}"
        return await self._json("PATCH", path, body=change, content_type="application/merge-patch+json")

    async def apply_sweep_status(self, sweep: QLoRASweep | StoredSweep, status: Object) -> None:
        """Replace the sweep's status, as `apply_status` does."""
        await self._apply_status(SWEEP_KIND, f"/namespaces/{sweep.namespace}/{SWEEP_PLURAL}", sweep, status)

    async def list_profiles(self) -> tuple[list[Object], str]:
        """List all QLoRAProfiles, without unused metadata, with the list's version."""
        pages = [page async for page in self._pages(f"{_QLORA}/{PROFILE_PLURAL}", [], compact)]
        return [body for page in pages for body in page.items], pages[0].version

    async def namespace_labels(self) -> dict[str, Mapping[str, str]]:
        """Read the labels of every Namespace, by its name."""
        return await self._labels(f"{_CORE}/namespaces", [])

    async def node_labels(self, selected: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
        """Read the labels of every Node that has the selected ones, by its name."""
        selector = ",".join(f"{key}={value}" for key, value in selected.items())
        return await self._labels(f"{_CORE}/nodes", [("labelSelector", selector)])

    async def _labels(self, path: str, selector: Query) -> dict[str, Mapping[str, str]]:
        pages = self._pages(path, selector, _labels_of, accept=_METADATA_ONLY)
        return {name: labels async for page in pages for name, labels in page.items}

    async def apply_profile_status(self, profile: StoredProfile, status: Object) -> Object:
        """Replace the profile's status, as `apply_status` does."""
        return await self._apply_status(PROFILE_KIND, f"/{PROFILE_PLURAL}", profile, status)

    async def _apply_status(
        self, kind: str, path: str, stored: QLoRAJob | QLoRASweep | StoredSweep | StoredProfile, status: Object
    ) -> Object:
        body = {
            "apiVersion": API_VERSION,
            "kind": kind,
            "metadata": {"name": stored.name, "uid": stored.uid, "resourceVersion": stored.resource_version},
            "status": status,
        }
        return await self._json(
            "PATCH",
            f"{_QLORA}{path}/{stored.name}/status",
            query=_APPLIED,
            body=body,
            content_type=_APPLY,
        )

    async def read_log(self, namespace: str, pod: str) -> str | None:
        """Return the end of the trainer's log, or None if it cannot be read now.

        That is at most 40 lines and 64 KiB.
        """
        # Without the container's name the server rejects the request if a sidecar was injected into the pod.
        query = [("container", TRAINER_CONTAINER), ("tailLines", str(_TAIL_LINES)), ("limitBytes", str(_TAIL_BYTES))]
        try:
            path = f"{_CORE}/namespaces/{namespace}/pods/{pod}/log"
            data = await self._request("GET", path, query=query, timeout=_BRIEF_TIMEOUT)
        except ClusterError as error:
            logger.debug("log of pod %s cannot be read: %s", pod, error)
            return None
        return data.decode(errors="replace")

    async def get_schema(self) -> Object:
        """Return the OpenAPI document of the version. Raises NotFoundError without one."""
        return await self._document("GET", f"/openapi/v3{_QLORA}")

    async def get_lease(self, namespace: str, name: str) -> Object | None:
        """Return the Lease, or None if it does not exist."""
        try:
            return await self._json("GET", f"{_LEASES}/namespaces/{namespace}/leases/{name}")
        except NotFoundError:
            return None

    async def create_lease(self, namespace: str, manifest: Object) -> Object:
        """Create a Lease. Raises AlreadyExistsError if the name is taken."""
        return await self._json("POST", f"{_LEASES}/namespaces/{namespace}/leases", body=manifest)

    async def replace_lease(self, namespace: str, name: str, manifest: Object) -> Object:
        """Replace a Lease. Raises ConflictError if it has changed since the read."""
        return await self._json("PUT", f"{_LEASES}/namespaces/{namespace}/leases/{name}", body=manifest)

    async def _list_pods(self, namespace: str, selector: Query) -> ChildList:
        return await self._children(f"{_CORE}/namespaces/{namespace}/pods", selector, partial(child_view, "pods"))

    async def _children(self, path: str, selector: Query, read: Callable[[Object], ChildView]) -> ChildList:
        pages = [page async for page in self._pages(path, selector, read)]
        return ChildList([item for page in pages for item in page.items], pages[0].version)


def _name_of(body: Object) -> tuple[str, str]:
    return body["metadata"]["namespace"], body["metadata"]["name"]


def _uid_of(body: Object) -> str:
    return str(body["metadata"]["uid"])


def _labels_of(body: Object) -> tuple[str, Mapping[str, str]]:
    return body["metadata"]["name"], body["metadata"].get("labels") or {}


def _labelled(label: str, value: str) -> Query:
    return [("labelSelector", f"{label}={value}")]


def _watched(kind: Kind, namespace: str | None) -> tuple[str, Query]:
    """Return path and selector of the watched objects.

    The operator watches all QLoRAJobs, but only its own Jobs and pods.
    """
    prefix = {"qlorajobs": _QLORA, "jobs": _JOBS, "pods": _CORE}[kind]
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{prefix}{where}/{kind}", [] if kind == "qlorajobs" else [("labelSelector", JOB_UID_LABEL)]
