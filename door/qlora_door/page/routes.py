"""Serves the page and passes its requests on, each with the rights of the viewer."""

import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from aiohttp import web

from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.spec.job import MAX_NAME_LENGTH
from qlora_door.errors import not_found
from qlora_door.namespace import Namespace
from qlora_operator.decisions.observed.objects import Object

Enter = Callable[[web.Request], Awaitable[Namespace]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A new release of the door has new files under the same names.
    "Cache-Control": "no-cache",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_INDEX = "index.html"
_MOST_JOBS = 500
"""Of a list: a browser draws no more, and reads it again every few seconds."""
_LISTED_SPEC = ("model", "scheduling", "gate", "suspend", "cancel")
_LISTED_STATUS = ("phase", "phaseSince", "conditions", "progress", "memory", "adapter", "gate", "queueName")


class Page:
    """The routes of the page."""

    def __init__(self, enter: Enter) -> None:
        self._enter = enter
        folder = files(__package__) / "static"
        self._files = {each.name: each.read_bytes() for each in folder.iterdir()}

    def routes(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and handler of each."""
        return [
            ("GET", "/", self._file),
            ("GET", "/page/static/{name}", self._file),
            ("GET", "/page/jobs", self._list_jobs),
            ("GET", "/page/jobs/{name}", self._get_job),
        ]

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info.get("name", _INDEX)
        if name not in self._files:
            raise not_found(f"file {name[:80]}")
        content_type = _TYPES[name.rpartition(".")[2]]
        return web.Response(body=self._files[name], content_type=content_type, charset="utf-8", headers=HEADERS)

    async def _list_jobs(self, request: web.Request) -> web.Response:
        namespace = await self._enter(request)
        jobs = await namespace.list_jobs(_summary)
        jobs.sort(key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]), reverse=True)
        return _answer({"namespace": namespace.name, "total": len(jobs), "items": jobs[:_MOST_JOBS]})

    async def _get_job(self, request: web.Request) -> web.Response:
        namespace, name = await self._enter(request), request.match_info["name"]
        return _answer(_without_bookkeeping(await namespace.get_job(_job_name(name))))


def _answer(content: Any) -> web.Response:
    return web.json_response(content, headers={"Cache-Control": "no-store"})


def _job_name(text: str) -> str:
    """Return the name, which becomes a part of a path. Raises ApiError unless it is one."""
    if len(text) > MAX_NAME_LENGTH or not re.fullmatch(DNS_LABEL, text):
        raise not_found(f"QLoRAJob {text[:80]}")
    return text


def _without_bookkeeping(stored: Object) -> Object:
    metadata = {name: value for name, value in stored["metadata"].items() if name != "managedFields"}
    return {**stored, "metadata": metadata}


def _summary(stored: Object) -> Object:
    """Return the parts of a QLoRAJob that a list shows."""
    metadata, spec, status = stored["metadata"], stored["spec"], stored.get("status") or {}
    return {
        "metadata": {name: metadata[name] for name in ("name", "creationTimestamp")},
        "spec": {name: spec[name] for name in _LISTED_SPEC if name in spec},
        "status": {name: status[name] for name in _LISTED_STATUS if name in status},
    }
