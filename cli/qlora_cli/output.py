"""Writes objects as kubectl does, and ends a command with an error or after a signal."""

import io
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click


def as_json(value: Mapping[str, Any]) -> str:
    """Indented, with a newline at its end."""
    return json.dumps(value, indent=4, ensure_ascii=False) + "\n"


def as_yaml(value: Mapping[str, Any]) -> str:
    """Write YAML 1.1 for `kubectl apply`: quotes text like a number or a truth value."""
    # Imported here: commands that print a table must start fast.
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.version = (1, 1)
    text = io.StringIO()
    writer.dump(json.loads(json.dumps(value)), text)
    return text.getvalue().removeprefix("%YAML 1.1\n---\n")


# Sent by `kill`, and by a closed terminal; Windows has no such signal.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def fail(message: str, exit_code: int = 1) -> NoReturn:
    """Print the message to standard error and exit."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(exit_code)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn these signals into SystemExit with 128 + their number, to reach `finally`."""
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
