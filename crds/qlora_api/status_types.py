"""The types of single values that a status, and a record, are made of."""

import re
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

MAX_MESSAGE_LENGTH = 1024
MAX_SHORT_TEXT_LENGTH = 256


def _check_time(text: str) -> str:
    # fromisoformat also accepts weeks, days of the year and times without a zone, which the API server rejects.
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text, re.ASCII):
        raise ValueError(f"found {text!r}, must be a time as RFC 3339 writes it, for example 2026-01-02T03:04:05Z")
    datetime.fromisoformat(text)
    return text


Timestamp = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"}), AfterValidator(_check_time)]
Message = Annotated[str, Field(max_length=MAX_MESSAGE_LENGTH)]
Bytes = Annotated[int, Field(ge=0, le=2**53)]
Count = Annotated[int, Field(ge=0, le=2**53)]
ShortText = Annotated[str, Field(max_length=MAX_SHORT_TEXT_LENGTH)]
Uri = Annotated[str, Field(max_length=1024)]
# JSON has no other numbers. A status with one would be rejected by the API server, again and again.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


MAX_RUNGS = 8
"""More cells than a sweep has are sorted out before the ninth."""
