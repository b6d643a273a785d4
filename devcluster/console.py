"""Shows one line per stage; the output of installers and image builders goes to a log file."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.processes import environment, tail

# Set to anything, it shows the output that otherwise goes to the log file.
VERBOSE = "VERBOSE"
_LARGEST_LOG_BYTES = 8 << 20
_LINES_OF_A_FAILURE = 40


def verbose() -> bool:
    """Whether the user wants to see everything."""
    return bool(os.environ.get(VERBOSE))


def say(text: str) -> None:
    """Print a stage's line to standard error: standard output is for answers."""
    print(text, file=sys.stderr, flush=True)


def mention(layout: Layout, text: str) -> None:
    """Write a detail: to the log file, or to standard error where VERBOSE is set."""
    with _noise(layout) as output:
        output.write(f"{text}\n".encode())


def run_noisy(
    layout: Layout, argv: Sequence[str | Path], *, seconds: float = 3600, env: Mapping[str, str] | None = None
) -> None:
    """Run an installer or a builder to its end, its output in the log file, or shown where VERBOSE is set.

    Without `env` it gets `processes.environment()`.

    Raises ClusterError with the command and the last lines of its output.
    """
    command = " ".join(map(str, argv))
    mention(layout, f"{time.strftime('%H:%M:%S')} {command}")
    with _noise(layout) as output:
        try:
            # A command that outlives a killed caller would keep changing the machine during `down`.
            status = subprocess.run(
                ["setpriv", "--pdeathsig", "TERM", *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment() if env is None else env,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{command}: not done after {seconds:.0f} s{_shown(layout)}") from None
    if status != 0:
        raise ClusterError(f"{command}: exit status {status}{_shown(layout)}")


def _shown(layout: Layout) -> str:
    """A note on the output of a failed command."""
    if verbose():
        return ", see above"
    return f"; last lines of {layout.build_log}:\n{tail(layout.build_log, _LINES_OF_A_FAILURE)}"


@contextmanager
def _noise(layout: Layout) -> Iterator[BinaryIO]:
    """The file for output that few users need."""
    if verbose():
        sys.stderr.flush()
        yield sys.stderr.buffer
        sys.stderr.buffer.flush()
        return
    log = layout.build_log
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > _LARGEST_LOG_BYTES:
        log.unlink()
    with log.open("ab") as output:
        yield output
