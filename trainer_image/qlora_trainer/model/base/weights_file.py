"""Writes a safetensors file of any size while it holds a single tensor."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.stores.contents import PublishedFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""The types of tensors that are written, by their names in the format."""
ALIGNMENT = 8
"""The first tensor's place in the file is a multiple of this many bytes."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_weights(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> PublishedFile:
    """Write a new, durable file with `tensors`, one after the other, which must be as `entries` describe them.

    Its format is that of https://github.com/huggingface/safetensors#format. Raises OSError.
    """
    header = _header(entries)
    digest, size = hashlib.sha256(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
                raise AssertionError(f"{entry} was announced, and {tensor.dtype} {list(tensor.shape)} has come")
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            size += file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return PublishedFile(sha256=digest.hexdigest(), size=size)


def _header(entries: Sequence[Entry]) -> bytes:
    """The header with its length, padded with spaces to the alignment."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.bytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(described, separators=(",", ":")).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content
