"""Sends requests to the API server, and reads lists in pages of a bounded size."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import aiohttp

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.errors import (
    ExpiredError,
    UnavailableError,
    error_for_status,
    first_characters,
    unusable_answer,
)
from qlora_operator.kube.listing import OBJECTS_PER_PAGE
from qlora_operator.kube.transport import Query, TooLongError, Transport

T = TypeVar("T")

_PAGES_AT_A_TIME = 2
# Of a page of several objects; real ones have half a megabyte. Parsed, it may take fifteen times as much.
_BYTES_PER_PAGE = 4 * 2**20


class Page(NamedTuple, Generic[T]):
    """The parts read of the objects of one page, and the version of the whole list."""

    items: Sequence[T]
    version: str


class Api:
    """Requests to one API server. All raise ClusterError."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        # Of all lists together: however many workers read one, and however large its objects are.
        self._room = asyncio.Semaphore(_PAGES_AT_A_TIME)

    async def _pages(
        self,
        path: str,
        selector: Query,
        read: Callable[[Object], T],
        *,
        longest: int = OBJECTS_PER_PAGE,
        **request: Any,
    ) -> AsyncIterator[Page[T]]:
        """Read a list, and keep only the results of `read` after each page of at most `longest` objects.

        Pages are halved until they are short enough, or have one object. A list whose token expires continues with the
        objects as they are then, under the version of its beginning.
        """
        token, size, expired = "", longest, False
        while True:
            query = [("limit", str(size)), *selector, *([("continue", token)] if token else [])]
            most = _BYTES_PER_PAGE if size > 1 else None
            try:
                # One expression: no name keeps an object alive. Nothing waits between the turn and its end, so that
                # each page is parsed before another one is read.
                page, token = _read_page(
                    await self._json("GET", path, query=query, most=most, turn=self._room, **request), read
                )
            except TooLongError:
                size //= 2
                continue
            except ExpiredError as error:
                # The token that the server offers for one that is too old is new: two in a row are an error.
                if expired or not error.next_token:
                    raise
                token, expired = error.next_token, True
                continue
            expired = False
            yield page
            if not token:
                return
            # Few large objects are no reason to ask for thousands of small ones one by one.
            size = min(2 * size, longest)

    async def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """An object of the API, or a list of them."""
        answer = await self._document(method, path, **request)
        if not isinstance(answer.get("metadata"), dict):
            raise unusable_answer(f"{method} {path}", "a JSON object without metadata")
        return answer

    async def _document(
        self, method: str, path: str, *, parse: Callable[[bytes], Any] | None = None, **request: Any
    ) -> dict[str, Any]:
        """Read a JSON object: a load balancer or login proxy may answer with anything."""
        data = await self._request(method, path, **request)
        try:
            answer = (parse or json.loads)(data)
        except ValueError as error:
            raise unusable_answer(f"{method} {path}", f"not JSON: {first_characters(data)!r}") from error
        if not isinstance(answer, dict):
            raise unusable_answer(f"{method} {path}", f"JSON, but no object: {first_characters(data)!r}")
        return answer

    async def _request(
        self,
        method: str,
        path: str,
        *,
        accept: str = "application/json",
        content_type: str = "application/json",
        **request: Any,
    ) -> bytes:
        headers = {"Accept": accept, "Content-Type": content_type}
        try:
            status, data = await self._transport.send(method, path, headers=headers, **request)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"{method} {path}: {str(error) or type(error).__name__}") from error
        if status >= 300:
            raise error_for_status(status, f"{method} {path}", data)
        return data


def _read_page(page: Object, read: Callable[[Object], T]) -> tuple[Page[T], str]:
    """Parse the page and return the token of the next one, empty for the last."""
    metadata = page["metadata"]
    items = [read(body) for body in page.get("items") or ()]
    return Page(items, metadata.get("resourceVersion", "")), metadata.get("continue") or ""
