"""The user's command line as typed: in a terminal, or with its output in a file."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.waiting import eventually


@dataclass
class Typed:
    """A command that runs."""

    process: "subprocess.Popen[bytes]"
    terminal: int
    _shown: bytearray = field(default_factory=bytearray)

    @property
    def shown(self) -> str:
        """All its output, with control characters."""
        return self._shown.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Return once it has printed that."""
        eventually(lambda: text in self.shown, every=0.05, what=f"{text!r} in {self.shown[-2000:]!r}")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(timeout=300)

    def _read(self) -> None:
        while True:
            ready, _, _ = select.select([self.terminal], [], [], 0.2)
            if not ready:
                if self.process.poll() is not None:
                    return
                continue
            try:
                data = os.read(self.terminal, 65536)
            except OSError:
                return
            if not data:
                return
            self._shown += data


def _heed_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def typed(*arguments: str, terminal: bool, columns: int = 120, **environment: str) -> Iterator[Typed]:
    """Run `qlora` until the block ends; `terminal`: with so many columns."""
    if terminal:
        reading, writing = pty.openpty()
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    else:
        reading, writing = os.pipe()
    values = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "TZ": "UTC", **environment}
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_cli", *arguments],
        env={**inherited, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", **values},
        stdin=writing if terminal else subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and so would their child processes.
        preexec_fn=_heed_interrupt,
    )
    os.close(writing)
    command = Typed(process, reading)
    reader = threading.Thread(target=command._read, daemon=True)
    reader.start()
    try:
        yield command
        reader.join(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(reading)
