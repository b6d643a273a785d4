"""A step's process, forked from one that has loaded the trainer: with pytest's patches, without unittest.mock's."""

import gc
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import patch

import torch

from qlora_trainer.__main__ import main
from qlora_trainer.training.distributed import launch

OpenFile = tuple[int, str]
"""A number and what it is open for: another file may get the number."""
_START = subprocess.Popen
_OPTIONS_OF_PYTHON = 3
"""`python -m qlora_trainer`"""


def start_forked(
    command: Sequence[str], env: Mapping[str, str], inherited: frozenset[OpenFile] = frozenset(), **streams: Any
) -> "subprocess.Popen[Any]":
    """Start a step by the trainer's command line, as `subprocess.Popen` does, without a new interpreter.

    It keeps the files `inherited`; those of this process by default.
    """
    for step in ("prepare", "train", "publish"):
        import_module(f"qlora_trainer.steps.{step}")
    be_step = partial(_be_step, command, dict(env), inherited or _open_files())
    # Python ignores the signals that would be restored.
    return _START(command, env=env, preexec_fn=be_step, restore_signals=False, **streams)


def _start_rank(
    inherited: frozenset[OpenFile], command: Sequence[str], env: Mapping[str, str], **streams: Any
) -> "subprocess.Popen[Any]":
    """Start another rank without the streams and locks of the first one, whose libraries keep their sockets."""
    of_libraries = {each for each in _open_files() if each[1].startswith(("socket:", "anon_inode:"))}
    return start_forked(command, env, inherited | of_libraries, **streams)


def _open_files() -> frozenset[OpenFile]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder that was read
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
    return frozenset(found)


def _be_step(command: Sequence[str], environment: dict[str, str], inherited: frozenset[OpenFile]) -> NoReturn:
    """Run the step where the program would be executed."""
    # These are pipes of subprocess; one of them shows it that the program is running. Libraries use the others.
    for number, _ in _open_files() - inherited:
        if number > 2:
            os.close(number)
    # What the tests' process still needs is not finalized here.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    sys.orig_argv = [*command]
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    tempfile.tempdir = None
    logging.getLogger().handlers.clear()
    # PyTorch's pool of threads is not forked.
    torch.set_num_threads(1)
    # The other ranks of the pod. They begin without what the first one waits for.
    vars(launch)["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": partial(_start_rank, inherited)})
    patch.stopall()
    first = Path(environment.get("PYTHONPATH", "").partition(os.pathsep)[0], "sitecustomize.py")
    try:
        if first.exists():
            runpy.run_path(str(first))
        main(command[_OPTIONS_OF_PYTHON:], "qlora_trainer")
    except BaseException:  # noqa: BLE001 - it must not go on as a second pytest
        traceback.print_exc()
    os._exit(1)
