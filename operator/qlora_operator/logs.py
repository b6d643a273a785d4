"""Writes the operator's log: one JSON object per line, with the job that it is about."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO


class JsonFormatter(logging.Formatter):
    """Fields: time, level, logger, message, and namespace and job if known."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        key = getattr(record, "key", None)
        if isinstance(key, tuple):
            entry["namespace"], entry["job"] = key
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(level: str, stream: TextIO = sys.stderr) -> None:
    """Send every logger's records to `stream` as JSON. The framework's own are kept to warnings, unless debugging."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        for name in ("kopf", "aiohttp", "kubernetes", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # A failing probe is logged once, by the operator, and not as a traceback at every request.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
