"""Cuts lists into the pages of OpenAI's API."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_door.errors import bad_request


def page(items: Sequence[Mapping[str, Any]], query: Mapping[str, str], *, default: int, most: int) -> dict[str, Any]:
    """Return the page of `items` after the one that the query names. Raises ApiError."""
    after, limit = query.get("after"), _limit(query.get("limit"), default, most)
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        # From the beginning, a client that walks through all pages would never end.
        raise bad_request(f"after: {after!r} is not in the list: begin again without after", "after")
    start = 0 if after is None else ids.index(after) + 1
    data = items[start : start + limit]
    return {
        "object": "list",
        "data": list(data),
        "has_more": start + limit < len(items),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _limit(text: str | None, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise bad_request(f"limit: found {text!r}, must be 1 to {most}", "limit")
    return int(text)
