"""Writes the operator's log: one JSON object per line, with the job it concerns."""

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TextIO

_REPEATED_AFTER_SECONDS = 600.0


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


class FrameworkFilter(logging.Filter):
    """Reduces each problem of the framework to one line per ten minutes.

    The framework writes a line for every request that it tries again, and a traceback for each of its tasks that ends
    with an error, which `handlers` reports and cures.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = monotonic
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if record.name == "asyncio":
            # Of its callbacks, when its tasks are ended.
            return "kopf" not in record.getMessage()
        if not record.name.startswith("kopf"):
            return True
        if record.exc_info and record.name.startswith("kopf._core.reactor"):
            return False
        now = self._now()
        self._said = {text: said for text, said in self._said.items() if now - said < _REPEATED_AFTER_SECONDS}
        # Each kind and each namespace has a watch, and tries are counted, in lines that are otherwise the same.
        text = re.sub(r"https?://\S+|[0-9]+", "", record.getMessage())
        if text in self._said:
            return False
        self._said[text] = now
        return True


def configure_logging(level: str, stream: TextIO = sys.stderr) -> None:
    """Send every logger's records to `stream` as JSON.

    The framework's own are kept to warnings, unless debugging.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    if level != "debug":
        handler.addFilter(FrameworkFilter())
        for name in ("kopf", "aiohttp", "kubernetes", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # That its log-in is canceled when the watches end.
        logging.getLogger("kopf.activities").setLevel(logging.ERROR)
        # Requests to a port that are not HTTP.
        logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
