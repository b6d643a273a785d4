"""Which paths may be read or written: regular files that stay inside their folder."""

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from qlora_trainer.core.failures import unsafe_artifact

_LISTED_NAMES = 12


def require_regular(path: Path, folder: Path, name: str) -> None:
    """Raise StepFailure UNSAFE_ARTIFACT unless `path` resolves to a file in `folder`."""
    if leads_to_itself(path):
        raise unsafe_artifact(f"{name} is a link that leads to itself: put the file itself there")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise unsafe_artifact(f"{name} is a link that leads out of its folder: put the file itself there")
    if not path.is_file():
        raise unsafe_artifact(f"{name} is not a regular file: put the file itself there")


def read_regular(path: Path, largest: int) -> bytes:
    """The content of a file of at most `largest` bytes. Raises ValueError if it is no regular file, or larger.

    Raises OSError if it is a link (ELOOP), missing or unreadable. Never waits for a writer, as that of a pipe.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path.name} has more than {largest} bytes")
    return content


def leads_to_itself(path: Path) -> bool:
    """Whether the path is a loop of links, which some Python versions cannot resolve."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def some_names(names: Iterable[str]) -> str:
    """The first names in alphabetical order, and the number of others."""
    ordered = sorted(names)
    more = len(ordered) - _LISTED_NAMES
    return (", ".join(ordered[:_LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")) or "none"


def confine(path: Path, root: Path) -> Path:
    """The resolved path. Raises StepFailure UNSAFE_ARTIFACT if it leads out of `root`."""
    if leads_to_itself(path):
        raise unsafe_artifact(f"{path} is a link that leads to itself: remove the symbolic link")
    resolved = path.resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise unsafe_artifact(f"{path} leads to {resolved}, outside of its volume: remove the symbolic link")
    return resolved
