"""Answers the requests of OpenAI's clients."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any, cast

from aiohttp import web

from qlora_door.bucket import Bucket
from qlora_door.entrance import enter
from qlora_door.errors import ApiError, api_error_of, bad_request
from qlora_door.files import Files
from qlora_door.history import checkpoints_of, events_of
from qlora_door.identity import Identify
from qlora_door.job import RESULTS_PREFIX, Job
from qlora_door.jobs import Jobs, Verb
from qlora_door.models import base_model, job_of, models_of, tuned_model
from qlora_door.namespace import Namespace
from qlora_door.page.routes import Page
from qlora_door.paging import page
from qlora_door.request import MAX_REQUEST_BYTES
from qlora_door.settings import DoorSettings
from qlora_door.upload import open_upload
from qlora_operator.kube.errors import ClusterError

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OnAnswer = Callable[[str, str, int, float], None]
"""Called after an answer with the method, the route, the status and the seconds."""


class Door:
    """The routes of the API."""

    def __init__(
        self,
        settings: DoorSettings,
        identify: Identify,
        bucket: Bucket | None,
        *,
        clock: Callable[[], datetime],
        on_answer: OnAnswer,
    ) -> None:
        self._settings, self._identify, self._bucket = settings, identify, bucket
        self._clock, self._on_answer = clock, on_answer

    def application(self) -> web.Application:
        """Return the application that answers."""
        application = web.Application(middlewares=[self._answered], client_max_size=MAX_REQUEST_BYTES)
        job = "/v1/fine_tuning/jobs/{id}"
        routes: list[tuple[str, str, Handler]] = [
            ("POST", "/v1/files", self._create_file),
            ("GET", "/v1/files", self._list_files),
            ("GET", "/v1/files/{id}", self._get_file),
            ("DELETE", "/v1/files/{id}", self._delete_file),
            ("GET", "/v1/files/{id}/content", self._read_file),
            ("POST", "/v1/fine_tuning/jobs", self._create_job),
            ("GET", "/v1/fine_tuning/jobs", self._list_jobs),
            ("GET", job, self._get_job),
            ("POST", f"{job}/{{verb:cancel|pause|resume}}", self._change_job),
            ("GET", f"{job}/events", self._list_events),
            ("GET", f"{job}/checkpoints", self._list_checkpoints),
            ("GET", "/v1/models", self._list_models),
            # Names of models have slashes.
            ("GET", "/v1/models/{id:.+}", self._get_model),
            ("DELETE", "/v1/models/{id:.+}", self._delete_model),
            *Page(self._enter).routes(),
        ]
        for method, path, handler in routes:
            application.router.add_route(method, path, handler)
        return application

    async def _enter(self, request: web.Request) -> Namespace:
        return await enter(request.headers, self._identify, self._settings.namespaces)

    async def _files(self, request: web.Request) -> Files:
        return Files(await self._enter(request), self._bucket)

    async def _jobs(self, request: web.Request) -> Jobs:
        namespace = await self._enter(request)
        return Jobs(namespace, Files(namespace, self._bucket), self._settings.models)

    async def _create_file(self, request: web.Request) -> web.Response:
        files = await self._files(request)
        upload = await open_upload(request, self._settings.files.max_bytes)
        return web.json_response((await files.create(upload)).view())

    async def _list_files(self, request: web.Request) -> web.Response:
        files = await (await self._files(request)).list()
        query = request.query
        if query.get("order", "desc") not in ("asc", "desc"):
            raise bad_request(f"order: found {query['order'][:80]!r}, must be asc or desc", "order")
        if query.get("order") == "asc":
            files.reverse()
        views = [file.view() for file in files if query.get("purpose") in (None, "fine-tune")]
        return web.json_response(page(views, query, default=10_000, most=10_000))

    async def _get_file(self, request: web.Request) -> web.Response:
        files, name = await self._files(request), request.match_info["id"]
        if name.startswith(RESULTS_PREFIX):
            return web.json_response((await files.results(name))[0])
        return web.json_response((await files.get(name)).view())

    async def _delete_file(self, request: web.Request) -> web.Response:
        files, name = await self._files(request), request.match_info["id"]
        if name.startswith(RESULTS_PREFIX):
            raise bad_request(f"file {name} is a part of its job, and is deleted with it")
        await files.delete(name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    async def _read_file(self, request: web.Request) -> web.StreamResponse:
        files, name = await self._files(request), request.match_info["id"]
        if name.startswith(RESULTS_PREFIX):
            return web.Response(body=(await files.results(name))[1], content_type="application/octet-stream")
        content = files.content(name)
        # An answer begins only once the content does: later, an error has no status.
        first = await anext(content, b"")
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        try:
            await response.write(first)
            async for chunk in content:
                await response.write(chunk)
            await response.write_eof()
        except ApiError as error:
            logger.warning("the content of %s breaks off: %s", name, error.message)
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _create_job(self, request: web.Request) -> web.Response:
        jobs = await self._jobs(request)
        return self._job(await jobs.create(await request.read(), request.headers.get("Idempotency-Key")))

    async def _list_jobs(self, request: web.Request) -> web.Response:
        now, wanted = self._clock(), _metadata(request.query)
        views = [job.view(now) for job in await (await self._jobs(request)).list(wanted)]
        return web.json_response(page(views, request.query, default=20, most=1000))

    async def _get_job(self, request: web.Request) -> web.Response:
        return self._job(await self._find_job(request))

    async def _change_job(self, request: web.Request) -> web.Response:
        verb = cast("Verb", request.match_info["verb"])
        return self._job(await (await self._jobs(request)).change(request.match_info["id"], verb))

    async def _list_events(self, request: web.Request) -> web.Response:
        events = events_of(await self._find_job(request))
        return web.json_response(page(events, request.query, default=20, most=1000))

    async def _list_checkpoints(self, request: web.Request) -> web.Response:
        checkpoints = checkpoints_of(await self._find_job(request))
        return web.json_response(page(checkpoints, request.query, default=10, most=1000))

    async def _find_job(self, request: web.Request) -> Job:
        return await (await self._jobs(request)).get(request.match_info["id"])

    async def _list_models(self, request: web.Request) -> web.Response:
        jobs = await (await self._jobs(request)).list({})
        return web.json_response({"object": "list", "data": models_of(self._settings.models, jobs)})

    async def _get_model(self, request: web.Request) -> web.Response:
        name, namespace = request.match_info["id"], await self._enter(request)
        if name in self._settings.models:
            return web.json_response(base_model(name))
        return web.json_response(tuned_model(name, await self._job_of_model(name, namespace)))

    async def _delete_model(self, request: web.Request) -> web.Response:
        name, namespace = request.match_info["id"], await self._enter(request)
        if name in self._settings.models:
            raise ApiError(403, f"model {name} is the administrator's", kind="permission_error", code="not_yours")
        job = await self._job_of_model(name, namespace)
        tuned_model(name, job)
        await self._jobs_in(namespace).delete(job.name)
        return web.json_response({"id": name, "object": "model", "deleted": True})

    async def _job_of_model(self, name: str, namespace: Namespace) -> Job:
        return await self._jobs_in(namespace).get(job_of(name, namespace.name))

    def _jobs_in(self, namespace: Namespace) -> Jobs:
        return Jobs(namespace, Files(namespace, self._bucket), self._settings.models)

    def _job(self, job: Job) -> web.Response:
        return web.json_response(job.view(self._clock()))

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            return error.response(request.method)
        except ClusterError as error:
            return api_error_of(error).response(request.method)
        except (ConnectionError, web.RequestPayloadError):
            return ApiError(400, "the connection broke off", code="disconnected").response(request.method)
        except web.HTTPException as error:
            message = f"{request.method} {request.path[:200]}: {error.reason}"
            return ApiError(error.status, message, code="unknown_url").response(request.method)
        except Exception:
            logger.exception("%s %s has failed", request.method, request.path)
            message = "the door has an error: its log has the cause"
            return ApiError(500, message, kind="server_error").response(request.method)

    @web.middleware
    async def _answered(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        began = time.monotonic()
        answer = await self._answer(request, handler)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "other"
        # Clients may send any method.
        method = request.method if request.method in ("GET", "POST", "DELETE") else "other"
        self._on_answer(method, route, answer.status, time.monotonic() - began)
        return answer


def _metadata(query: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata that a list is limited to: metadata[KEY]=VALUE."""
    found = {key: value for key, value in query.items() if key.startswith("metadata[") and key.endswith("]")}
    return {key[len("metadata[") : -1]: value for key, value in found.items()}
