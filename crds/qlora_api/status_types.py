"""The types of single values that a status, and a record, are made of."""

import re
from datetime import datetime
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

MAX_MESSAGE_LENGTH = 1024
MAX_SHORT_TEXT_LENGTH = 256


def _check_time(text: str) -> str:
    # fromisoformat also accepts weeks, days of the year and times without a zone, which the API server rejects.
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text, re.ASCII):
        raise ValueError(f"found {text!r}, must be a time as RFC 3339 writes it, for example 2026-01-02T03:04:05Z")
    datetime.fromisoformat(text)
    return text


_HOURS = r"^[0-9]{1,12}\.[0-9]{2,4}$"


def seconds_of(hours: str) -> int:
    """The seconds in hours as a status has them. Raises ValueError."""
    if not re.fullmatch(_HOURS, hours, re.ASCII):
        raise ValueError(f"found {hours!r}, must be hours with two to four decimals, for example 12.50")
    return round(Decimal(hours) * 3600)


def hours_of(seconds: int) -> str:
    """Format seconds as hours. Four decimals tell each second from the next; two are always shown."""
    text = f"{Decimal(seconds) / 3600:.4f}"
    return text[:-2] + text[-2:].rstrip("0")


GpuTime = Annotated[
    int,
    Field(ge=0, le=2**53),
    BeforeValidator(lambda value: seconds_of(value) if isinstance(value, str) else value),
    PlainSerializer(hours_of, return_type=str),
    WithJsonSchema({"type": "string", "maxLength": 17, "pattern": _HOURS}),
]
"""Seconds times GPUs in Python, GPU hours in JSON: sums of seconds are exact, and the API has one unit."""
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
