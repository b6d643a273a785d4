"""Tokenized rows in chunks, each a file that is read as memory."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.sampling import RowIndices

Int32s = NDArray[numpy.int32]
Flags = NDArray[numpy.uint8]
_FACTS = "facts"


@dataclass(frozen=True)
class Dropped:
    """Rows of a chunk that are not used."""

    unlabeled: int = 0
    """Rows of which no token counts in the loss."""
    first_unlabeled: str | None = None
    """Place of the first of them."""
    first_too_long: str | None = None
    """Place of the first row that is longer than a sequence may be."""


@dataclass(frozen=True)
class Chunk:
    """Some rows, one after the other."""

    input_ids: Int32s
    """int32 [tokens]"""
    is_target: Flags
    """uint8 [tokens]: 1 where the token counts in the loss"""
    lengths: Int32s
    """int32 [rows]: tokens of each row"""
    target_counts: Int32s
    """int32 [rows]: tokens of each row that count in the loss"""
    too_long: Int32s
    """int32 [rows left out because they are too long]: their tokens"""
    dropped: Dropped = Dropped()

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[Sequence[int] | Int32s, Sequence[bool] | NDArray[numpy.bool_]]],
        too_long: Sequence[int] = (),
        dropped: Dropped = Dropped(),
    ) -> "Chunk":
        """The chunk of rows given as token ids and target flags. Raises ValueError if the two differ in length."""
        pairs = [(numpy.asarray(ids, numpy.int32), numpy.asarray(flags, numpy.uint8)) for ids, flags in rows]
        for ids, flags in pairs:
            if len(ids) != len(flags):
                raise ValueError(f"{len(ids)} tokens but {len(flags)} target flags")
        return cls(
            numpy.concatenate([numpy.empty(0, numpy.int32), *(ids for ids, _ in pairs)]),
            numpy.concatenate([numpy.empty(0, numpy.uint8), *(flags for _, flags in pairs)]),
            numpy.array([len(ids) for ids, _ in pairs], dtype=numpy.int32),
            numpy.array([int(flags.sum()) for _, flags in pairs], dtype=numpy.int32),
            numpy.array(too_long, dtype=numpy.int32),
            dropped,
        )

    @property
    def rows_read(self) -> int:
        """Rows that were read, used or not."""
        return len(self.lengths) + len(self.too_long) + self.dropped.unlabeled

    def write(self, path: Path) -> None:
        """Write the chunk to disk, durably: whole or not at all. Raises OSError."""
        facts = {_FACTS: json.dumps(asdict(self.dropped), sort_keys=True)}
        write_atomically(path, save(self._tensors(), metadata=facts))

    def _tensors(self) -> dict[str, NDArray[Any]]:
        names = ("input_ids", "is_target", "lengths", "target_counts", "too_long")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def read(cls, path: Path) -> "Chunk | None":
        """The chunk of a file, mapped into memory and read from disk as it is looked at; None if it is not whole."""
        try:
            with cast("Any", safe_open(path, framework="pt")) as file:
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
                return cls(**tensors, dropped=Dropped(**json.loads(file.metadata()[_FACTS])))
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None


class TokenizedRows:
    """All used rows of a source. In memory are 16 bytes a row; the tokens stay where the chunks are."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = tuple(chunks)
        none = numpy.empty(0, numpy.int32)
        self.lengths: Int32s = numpy.concatenate([none, *(chunk.lengths for chunk in chunks)])
        self.target_counts: Int32s = numpy.concatenate([none, *(chunk.target_counts for chunk in chunks)])
        """int32 [rows]: tokens that count in the loss"""
        self._first = numpy.cumsum([0, *(len(chunk.lengths) for chunk in chunks)])
        ends = numpy.cumsum(self.lengths, dtype=numpy.int64)
        before = numpy.concatenate(([0], ends))[self._first[:-1]]
        self._starts = ends - self.lengths - numpy.repeat(before, numpy.diff(self._first))

    def __len__(self) -> int:
        return len(self.lengths)

    def input_ids(self, rows: RowIndices) -> Int32s:
        """int32 [tokens]: the token ids of the rows, in their order."""
        return self._gather([chunk.input_ids for chunk in self._chunks], rows)

    def is_target(self, rows: RowIndices) -> Flags:
        """uint8 [tokens]: the target flags of the rows, in their order."""
        return self._gather([chunk.is_target for chunk in self._chunks], rows)

    def _gather(self, arrays: Sequence[NDArray[Any]], rows: RowIndices) -> NDArray[Any]:
        chunks = numpy.searchsorted(self._first, rows, side="right") - 1
        starts = self._starts[rows]
        ends = starts + self.lengths[rows]
        places = zip(chunks.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return numpy.concatenate([arrays[chunk][start:end] for chunk, start, end in places])
