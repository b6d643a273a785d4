"""Keeps large files in the administrator's bucket, with the door's own cloud identity."""

from collections.abc import AsyncIterator
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from qlora_door.errors import ApiError, unavailable
from qlora_door.settings import BucketSettings

_PART_BYTES = 5 * 2**20


class Bucket:
    """Objects below the folder of a namespace. All calls raise ApiError."""

    def __init__(self, settings: BucketSettings) -> None:
        """Open the bucket. Credentials are those of the environment, as the cloud's libraries find them."""
        self._address = settings.address
        scheme, _, path = settings.address.partition("://")
        self._folder = path.partition("/")[2]
        options: dict[str, Any] = {}
        if settings.endpoint is not None:
            options["endpoint"] = settings.endpoint
            options["client_options"] = {"allow_http": settings.endpoint.startswith("http://")}
        if settings.region is not None:
            options["region"] = settings.region
        self._store = from_url(f"{scheme}://{path.partition('/')[0]}", **options)

    def address_of(self, namespace: str, file: str) -> str:
        """Return the address that a job reads the file at."""
        return f"{self._address}/{namespace}/{file}.jsonl"

    def _key(self, namespace: str, file: str) -> str:
        return "/".join(filter(None, (self._folder, namespace, f"{file}.jsonl")))

    async def write(self, namespace: str, file: str, chunks: AsyncIterator[bytes]) -> None:
        """Write a file while it arrives. Nothing stays if `chunks` raises."""
        try:
            key = self._key(namespace, file)
            # Each part that is on its way is in memory.
            await obstore.put_async(self._store, key, chunks, chunk_size=_PART_BYTES, max_concurrency=2)
        except BaseError as error:
            raise _failed(error) from error

    async def read(self, namespace: str, file: str) -> AsyncIterator[bytes]:
        """Yield the content of a file."""
        try:
            found = await obstore.get_async(self._store, self._key(namespace, file))
            async for chunk in found.stream(min_chunk_size=2**20):
                yield bytes(chunk)
        except FileNotFoundError:
            raise ApiError(404, f"the bucket has no {file} any more", code="not_found") from None
        except BaseError as error:
            raise _failed(error) from error

    async def delete(self, namespace: str, file: str) -> None:
        """Delete a file, if it exists."""
        try:
            await obstore.delete_async(self._store, self._key(namespace, file))
        except FileNotFoundError:
            return
        except BaseError as error:
            raise _failed(error) from error


def _failed(error: BaseError) -> ApiError:
    # The library's text may repeat the server's whole answer.
    return unavailable(f"the bucket for files cannot be used: {str(error).splitlines()[0][:300]}")
