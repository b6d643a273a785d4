"""Reads how much main memory a process holds and has held, from Linux's /proc."""

import ctypes
from pathlib import Path

KIB = 1024


def resident_bytes(process: int | str = "self") -> int:
    """Memory that the process holds now. Raises FileNotFoundError when it has ended."""
    return _status(process, "VmRSS")


def anonymous_bytes(process: int | str = "self") -> int:
    """Return the bytes that belong to no file, so that the kernel cannot drop them."""
    return _status(process, "RssAnon")


def shared_bytes(process: int | str = "self") -> int:
    """Return bytes of shared memory and memory file systems, which cannot be dropped."""
    return _status(process, "RssShmem")


def peak_resident_bytes(process: int | str = "self") -> int:
    """The peak since its start, or since `forget_peak`.

    Unlike getrusage's figure it does not begin with that of the process that started this one.
    """
    return _status(process, "VmHWM")


def forget_peak() -> None:
    """Reset this process's peak."""
    Path("/proc/self/clear_refs").write_text("5")


def release_freed() -> None:
    """Return freed memory from the allocator (tcmalloc or glibc's) to the kernel."""
    loaded = ctypes.CDLL(None)
    if hasattr(loaded, "MallocExtension_ReleaseFreeMemory"):
        loaded.MallocExtension_ReleaseFreeMemory()
    loaded.malloc_trim(0)


def _status(process: int | str, name: str) -> int:
    # A process that ends while it is read has no memory any more.
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    return 0
