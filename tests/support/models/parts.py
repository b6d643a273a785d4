"""Bars a rank from the other ranks' parts of the mapped base: a read ends its process."""

import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_PROT_NONE = 0
_BYTES_OF_ROW = 2
"""Packed weights are sharded in rows of one bfloat16."""


def bar_other_parts(folder: Path, ranks: int) -> None:
    """Do so as soon as a file of the base in `folder` is mapped, in this process, and until it ends.

    Once the base is sharded, `FOLDER.rank-N` has a line of JSON: the bytes that are `barred`, and the bytes of weights
    with data that FSDP was `given`.
    """
    from qlora_trainer.training import open_run
    from qlora_trainer.training.distributed import sharding

    rank, noted = int(os.environ.get("RANK", "0")), {"barred": 0, "given": 0}
    from_file, shard_base = torch.UntypedStorage.from_file, sharding.shard_base
    fully_shard = vars(sharding)["fully_shard"]

    def mapped(name: Any, *arguments: Any, **settings: Any) -> Any:
        storage = from_file(name, *arguments, **settings)
        if Path(name).parent == folder:
            for begin, end in _other_parts(Path(name), rank, ranks):
                noted["barred"] += _bar(storage.data_ptr() + begin, storage.data_ptr() + end)
        return storage

    def given(module: Any, *, ignored_params: set[Any], **settings: Any) -> None:
        managed = [parameter for parameter in module.parameters() if parameter not in ignored_params]
        whole = [parameter for parameter in managed if not hasattr(parameter, "to_local")]
        noted["given"] += sum(parameter.nbytes for parameter in whole if not parameter.is_meta)
        fully_shard(module, ignored_params=ignored_params, **settings)

    def sharded(*arguments: Any) -> None:
        shard_base(*arguments)
        Path(f"{folder}.rank-{rank}").write_text(json.dumps(noted))

    vars(open_run)["shard_base"], vars(sharding)["fully_shard"] = sharded, given
    torch.UntypedStorage.from_file = mapped


def packed_weights(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and end of each packed weight in a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if f"{name}.absmax" in header:
            begin, end = entry["data_offsets"]
            yield 8 + size + begin, 8 + size + end


def _other_parts(path: Path, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    for begin, end in packed_weights(path):
        part = -(-(end - begin) // _BYTES_OF_ROW // ranks) * _BYTES_OF_ROW
        own, own_end = min(begin + rank * part, end), min(begin + (rank + 1) * part, end)
        yield begin, own
        yield own_end, end


def _bar(begin: int, end: int) -> int:
    """Have the kernel reject access to whole pages of a range, and return their size."""
    first, size = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, 0
    if end // mmap.PAGESIZE * mmap.PAGESIZE > first:
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(first), ctypes.c_size_t(size), _PROT_NONE) == 0, ctypes.get_errno()
    return size
