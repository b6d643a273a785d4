"""Sets up a step's process (environment, streams, signals) before heavy imports."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from qlora_api.status import StepName
from qlora_trainer.core import cpu
from qlora_trainer.core.context import Device

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables of PyTorch's GPU allocator settings: the name, and the earlier one."""
ALLOCATOR_SETTINGS = "expandable_segments:True,pinned_max_round_threshold_mb:16"
"""Nearly every micro batch has another number of tokens. In segments of fixed size that leaves gaps, which no later
tensor fits into. Pinned memory for larger tensors would be rounded up to a power of two."""


@dataclass(frozen=True)
class Streams:
    """The process's standard output and error, hidden from libraries that print."""

    records: TextIO
    errors: TextIO


def claim_streams() -> Streams:
    """Keep the standard streams for the step. Discard other prints until `log_to`."""
    streams = Streams(
        records=os.fdopen(os.dup(1), "w", encoding="utf-8"),
        errors=os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace"),
    )
    _send_output_to(os.open(os.devnull, os.O_WRONLY))
    return streams


def log_to(path: Path, heading: str) -> None:
    """Send output to the file at `path`, and keep one previous. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Also a dangling link, which would be followed.
    if os.path.lexists(path):
        path.replace(path.with_name(path.name + ".1"))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    os.write(log, f"{heading}\n".encode())
    os.fsync(log)
    _send_output_to(log)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    # They would log the signed addresses of downloads, which give access without credentials.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def _send_output_to(descriptor: int) -> None:
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(descriptor, number)
    os.close(descriptor)


def hide_gpus() -> None:
    """Let the libraries that this process loads from now on see no GPU.

    bitsandbytes starts CUDA on each GPU that it sees, already when it is imported. A process that is forked afterwards
    cannot compute: autograd wants a thread for each GPU, and the process is aborted because that cannot be had.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def set_environment(step: StepName, workspace: Path, *, device: Device = "cpu", publishes_to_hub: bool = False) -> None:
    """Switch off telemetry everywhere, and the hub where it is not needed, before libraries are loaded.

    Only a step that trains on a GPU sees one. The root file system of a pod is read-only and its user often unknown:
    libraries that keep caches below the home directory, or ask for the user's name, are given both.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.update(cpu.library_settings(os.environ))
    if step != "train" or device != "cuda":
        hide_gpus()
    elif not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = ALLOCATOR_SETTINGS
    if step != "prepare" and not (step == "publish" and publishes_to_hub):
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        scratch = Path(tempfile.gettempdir())
    except FileNotFoundError:  # neither TMPDIR nor /tmp can be written
        scratch = workspace / "tmp"
        scratch.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    home = Path(os.path.expanduser("~"))
    if not (home.is_dir() and os.access(home, os.W_OK)):
        os.environ["HOME"] = str(scratch)
    os.environ.setdefault("LOGNAME", "qlora")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "torchinductor"))


def on_termination(action: Callable[[], None]) -> None:
    """Call `action` on SIGTERM and on Ctrl-C."""

    def handle(_signal: int, _frame: object) -> None:
        action()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def ignore_termination() -> None:
    """Ignore signals from now on, so that the result record is not cut off."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
