"""Models and finished runs that are made once, for all test processes and for later runs of unchanged sources."""

import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import qlora_api
import qlora_trainer
from devcluster.layout import from_environment

_UNUSED_SECONDS = 24 * 3600
_SUPPORT = Path(__file__).parents[1]
_OTHERS = (_SUPPORT.parent / "trainer" / "conftest.py", _SUPPORT.parents[1] / "uv.lock")


@contextmanager
def kept(name: str, make: Callable[[Path], object]) -> Iterator[Path]:
    """Yield the folder that `make` fills, now or in an earlier run.

    Raises AssertionError at the end if the folder was changed, and then makes it again next time.
    """
    home = from_environment().cache / "test-runs" / _sources()
    home.mkdir(parents=True, exist_ok=True)
    _remove_unused(home)
    folder, seal = home / name, home / f"{name}.seal"
    with (home / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not seal.exists() or seal.read_text() != _state(folder):
            seal.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            seal.write_text(_state(folder))
    yield folder
    assert _state(folder) == seal.read_text(), f"a test has changed a file of {folder}, which others read: copy it"


@cache
def _sources() -> str:
    """A digest of what decides the bytes of a run on this machine."""
    digest = hashlib.sha256(f"{platform.python_version()} {_processor()}".encode())
    folders = (_SUPPORT, *(Path(package.__path__[0]) for package in (qlora_api, qlora_trainer)))
    found = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix != ".pyc"]
    for path in (*found, *_OTHERS):
        if path.is_file():
            digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The instructions of the processor, which choose among kernels."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line for line in lines if line.startswith(("flags", "Features")))


def _state(folder: Path) -> str:
    """The files with sizes and times of their last changes."""
    found = ((path.relative_to(folder), path.lstat()) for path in sorted(folder.rglob("*")) if not path.is_dir())
    return "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in found)


def _remove_unused(home: Path) -> None:
    """Remove what no run of the last day has used."""
    os.utime(home)
    for other in home.parent.iterdir():
        # Another process may remove the same folder.
        with suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
