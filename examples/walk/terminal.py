"""Captures the output of a command on a terminal, colors included, for the pictures of the documentation."""

import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from examples.walk.runner import Shell, WalkError

_COLUMNS, _LINES = 110, 60


def screen_after(command: str, shell: Shell) -> str:
    """The terminal's lines when the command has ended, with the escape sequences of their colors.

    Raises WalkError if it takes too long. Needs tmux.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tmux = ["tmux", "-S", str(Path(scratch, "socket")), "-f", "/dev/null"]
        ended = Path(scratch, "ended")
        # The pane stays until it has been captured.
        script = f"export TERM=tmux-256color; {command}; touch {shlex.quote(str(ended))}; sleep infinity"
        environment = {name: value for name, value in shell.environment().items() if name not in ("NO_COLOR", "TMUX")}
        size = ["-x", str(_COLUMNS), "-y", str(_LINES)]
        subprocess.run(
            [*tmux, "new-session", "-d", *size, "bash", "-c", script], cwd=shell.folder, env=environment, check=True
        )
        try:
            deadline = time.monotonic() + shell.seconds
            while not ended.exists():
                if time.monotonic() > deadline:
                    raise WalkError(f"{command}: not done after {shell.seconds:.0f} s in a terminal")
                time.sleep(0.2)
            captured = subprocess.run(
                [*tmux, "capture-pane", "-e", "-p", "-N"], check=True, capture_output=True, text=True
            )
            return captured.stdout.rstrip("\n")
        finally:
            subprocess.run([*tmux, "kill-server"], check=False, capture_output=True)
