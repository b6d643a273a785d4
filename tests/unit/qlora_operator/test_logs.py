"""The log: JSON, line by line, and one line for each problem."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from qlora_operator.logs import FrameworkFilter, configure_logging


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    yield stream
    root.handlers[:], root.level = before
    logging.captureWarnings(False)


def test_every_line_is_json_for_any_message(written: io.StringIO) -> None:
    configure_logging("info", written)
    logging.getLogger("qlora_operator").info("two\nlines", extra={"key": ("team", "a")})
    several = ExceptionGroup("several", [ValueError("one"), ValueError("two")])
    logging.getLogger("qlora_operator").error("failed", exc_info=several)
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    entries = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [entry["level"] for entry in entries][:2] == ["info", "error"]
    assert (entries[0]["message"], entries[0]["namespace"], entries[0]["job"]) == ("two\nlines", "team", "a")


def test_the_framework_logs_a_problem_once_in_ten_minutes() -> None:
    now = [0.0]
    judge = FrameworkFilter(lambda: now[0])

    def passes(text: str, name: str = "kopf._cogs.clients.watching", *, trace: bool = False) -> bool:
        trouble = (ValueError, ValueError("x"), None) if trace else None
        return judge.filter(logging.LogRecord(name, logging.ERROR, "", 0, text, (), trouble))

    def trial(number: int, kind: str, error: str) -> str:
        return (
            f"Request attempt #{number} failed; will retry: GET https://host/{kind}?resourceVersion={number} -> {error}"
        )

    assert passes(trial(1, "jobs", "refused"))
    assert not passes(trial(2, "jobs", "refused"))
    assert not passes(trial(2, "pods", "refused"))
    assert passes(trial(3, "pods", "forbidden"))
    assert not passes("Watcher for pods has failed", "kopf._core.reactor.orchestration", trace=True)
    assert passes("Handler 'job_changed' failed with an exception", "kopf.objects", trace=True)
    assert passes("reconcile failed", "qlora_operator.reconcile.queue", trace=True)
    assert passes("reconcile failed", "qlora_operator.reconcile.queue", trace=True)
    assert not passes("Exception in callback stream at /usr/lib/kopf/_cogs/clients/api.py:237", "asyncio", trace=True)
    assert passes("Unclosed connector", "asyncio")
    now[0] = 600
    assert passes(trial(40, "jobs", "refused"))
