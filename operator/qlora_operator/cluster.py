"""Calls the API server: the only importer of the Kubernetes client. Plain objects in, plain objects out.

Every call has a timeout and raises a ClusterError whose class says what to do: wait, read again or report.
"""

import json
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from qlora_api.contract import TRAINER_CONTAINER
from qlora_api.naming import JOB_UID_LABEL
from qlora_api.v1alpha1 import API_VERSION, GROUP, KIND, PLURAL, VERSION
from qlora_operator.decisions.observe import Object, QLoRAJob

logger = logging.getLogger(__name__)

FIELD_MANAGER = "qlora-operator"
_TIMEOUT = aiohttp.ClientTimeout(total=15, connect=5)
# A log comes from a node through the API server: a slow one is not worth waiting for.
_LOG_TIMEOUT = aiohttp.ClientTimeout(total=5, connect=5)
_PAGE = "500"
_TAIL_LINES = 40
_TAIL_BYTES = 64 * 1024
_SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

_JOBS = "/apis/batch/v1"
_CORE = "/api/v1"
_QLORA = f"/apis/{GROUP}/{VERSION}"

Query = list[tuple[str, str]]


class ClusterError(Exception):
    """The API server was not reached, or could not answer: try again later."""


class NotFoundError(ClusterError):
    """The object does not exist."""


class ConflictError(ClusterError):
    """The object exists already, has changed since it was read, or is another one (UID) of the same name."""


class RejectedError(ClusterError):
    """The API server rejects the request as it is; the message is the server's own."""


class Cluster:
    """The calls that the operator makes, and no others. All raise ClusterError."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def get_qlora_job(self, namespace: str, name: str) -> Object | None:
        """The QLoRAJob as stored now; None if it does not exist."""
        try:
            return await self._json("GET", f"{_QLORA}/namespaces/{namespace}/{PLURAL}/{name}")
        except NotFoundError:
            return None

    async def list_qlora_jobs(self, namespace: str) -> list[Object]:
        """All QLoRAJobs of the namespace as stored now."""
        return await self._list(f"{_QLORA}/namespaces/{namespace}/{PLURAL}", [])

    async def list_jobs(self, namespace: str, job_uid: str) -> list[Object]:
        """The Jobs that have the label of this QLoRAJob."""
        selector = [("labelSelector", f"{JOB_UID_LABEL}={job_uid}")]
        return await self._list(f"{_JOBS}/namespaces/{namespace}/jobs", selector)

    async def list_pods(self, namespace: str, job_uid: str) -> list[Object]:
        """The pods that have the label of this QLoRAJob."""
        selector = [("labelSelector", f"{JOB_UID_LABEL}={job_uid}")]
        return await self._list(f"{_CORE}/namespaces/{namespace}/pods", selector)

    async def list_metadata(self, kind: str, namespace: str | None) -> list[Object]:
        """Metadata of all QLoRAJobs, or of all our Jobs or pods, in one namespace or in all (None)."""
        path, selector = _listed(kind, namespace)
        return await self._list(path, selector, accept=_METADATA_ONLY)

    async def check_list(self, kind: str, namespace: str | None) -> None:
        """List one object of the kind, to check the connection. Raises RejectedError if that is no longer allowed."""
        path, selector = _listed(kind, namespace)
        await self._json("GET", path, query=[("limit", "1"), *selector], accept=_METADATA_ONLY)

    async def create_job(self, namespace: str, manifest: Object) -> Object:
        """Create a Job. Raises ConflictError if the name is taken, RejectedError with the server's reason."""
        return await self._json("POST", f"{_JOBS}/namespaces/{namespace}/jobs", body=manifest)

    async def get_job(self, namespace: str, name: str) -> Object:
        """One Job. Raises NotFoundError."""
        return await self._json("GET", f"{_JOBS}/namespaces/{namespace}/jobs/{name}")

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete this very Job and, in the background, its pods: the default for Jobs would orphan the pods."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            await self._json("DELETE", f"{_JOBS}/namespaces/{namespace}/jobs/{name}", body=options)
        except (NotFoundError, ConflictError):
            logger.debug("Job %s is already gone", name, extra={"key": (namespace, name)})

    async def create_claim(self, namespace: str, manifest: Object) -> None:
        """Create a PersistentVolumeClaim. Raises ConflictError if the name is taken."""
        await self._json("POST", f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims", body=manifest)

    async def get_claim(self, namespace: str, name: str) -> Object:
        """One PersistentVolumeClaim. Raises NotFoundError."""
        return await self._json("GET", f"{_CORE}/namespaces/{namespace}/persistentvolumeclaims/{name}")

    async def create_event(self, namespace: str, manifest: Object) -> None:
        """Create an Event. Raises ConflictError if it exists already."""
        await self._json("POST", f"{_CORE}/namespaces/{namespace}/events", body=manifest)

    async def apply_status(self, job: QLoRAJob, status: Object) -> None:
        """Replace the job's status, which nobody else writes, by server-side apply.

        Raises ConflictError if the job has changed since it was read, or is another one of the same name.
        """
        body = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": job.name, "uid": job.uid, "resourceVersion": job.resource_version},
            "status": status,
        }
        await self._json(
            "PATCH",
            f"{_QLORA}/namespaces/{job.namespace}/{PLURAL}/{job.name}/status",
            query=[("fieldManager", FIELD_MANAGER), ("force", "true")],
            body=body,
            content_type="application/apply-patch+yaml",
        )

    async def read_log(self, namespace: str, pod: str) -> str | None:
        """The end of the trainer's log, at most 40 lines and 64 KiB; None if it cannot be read now."""
        # Without the container's name the server rejects the request if a sidecar was injected into the pod.
        query = [("container", TRAINER_CONTAINER), ("tailLines", str(_TAIL_LINES)), ("limitBytes", str(_TAIL_BYTES))]
        try:
            path = f"{_CORE}/namespaces/{namespace}/pods/{pod}/log"
            data = await self._request("GET", path, query=query, timeout=_LOG_TIMEOUT)
        except ClusterError as error:
            logger.debug("log of pod %s cannot be read: %s", pod, error)
            return None
        return data.decode(errors="replace")

    async def _list(self, path: str, selector: Query, accept: str = "application/json") -> list[Object]:
        items: list[Object] = []
        token = ""
        while True:
            query = [("limit", _PAGE), *selector, *([("continue", token)] if token else [])]
            page = await self._json("GET", path, query=query, accept=accept)
            items += page.get("items") or ()
            token = page["metadata"].get("continue") or ""
            if not token:
                return items

    async def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = json.loads(await self._request(method, path, **request))
        return dict(answer)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        accept: str = "application/json",
        content_type: str = "application/json",
        timeout: aiohttp.ClientTimeout = _TIMEOUT,  # noqa: ASYNC109 - passed on to the HTTP client
    ) -> bytes:
        headers = {"Accept": accept, "Content-Type": content_type}
        try:
            method, url, headers, content, _ = await self._api.param_serialize(
                method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            response = await self._api.call_api(method, url, headers, content, _request_timeout=timeout)
            data: bytes = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _error(response.status, f"{method} {path}", data)
        return data


def _listed(kind: str, namespace: str | None) -> tuple[str, Query]:
    """Path and selector of the objects that the operator watches: all QLoRAJobs, but only its own Jobs and pods."""
    prefix = {"qlorajobs": _QLORA, "jobs": _JOBS, "pods": _CORE}[kind]
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{prefix}{where}/{kind}", [] if kind == "qlorajobs" else [("labelSelector", JOB_UID_LABEL)]


def _error(status: int, request: str, data: bytes) -> ClusterError:
    try:
        answer = json.loads(data)
        text = str(answer.get("message", "")) if isinstance(answer, dict) else ""
    except ValueError:
        text = data[:200].decode(errors="replace")
    if status == 404:
        return NotFoundError(f"{request}: {text}")
    if status == 409:
        return ConflictError(f"{request}: {text}")
    if status in (400, 401, 403, 422):
        return RejectedError(text)
    return ClusterError(f"{request}: status {status}: {text}")


@asynccontextmanager
async def connect() -> AsyncIterator[Cluster]:
    """The cluster that the pod runs in, or else that of the kubeconfig. Raises ClusterError without either."""
    configuration = client.Configuration()
    try:
        if os.path.exists(_SERVICE_ACCOUNT_TOKEN) and "KUBECONFIG" not in os.environ:  # noqa: ASYNC240 - once, at start
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
    except config.ConfigException as error:
        raise ClusterError(f"no cluster is reachable: {error}") from error
    async with client.ApiClient(configuration) as api:
        api.user_agent = FIELD_MANAGER
        yield Cluster(api)
