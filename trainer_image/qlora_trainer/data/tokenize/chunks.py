"""Tokenized rows in memory-mapped chunk files, and all of them as one list."""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.sampling import RowIndices

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", bound=numpy.integer)
Int32s = NDArray[numpy.int32]
Flags = NDArray[numpy.uint8]
Digests = NDArray[numpy.uint8]
"""uint8 [rows, 16]: the digest of each row, see `row_digest`."""
DIGEST_BYTES = 16
_FACTS = "facts"
_DROPPED = "dropped"
_DIGEST = "blake2b"
_BETWEEN = "\0"


def row_digest(row: TokenizedRow) -> bytes:
    """A digest of the row's tokens and targets, and of where a pair's second answer begins: they differ as these do.

    BLAKE2b of 128 bits. Two of n different rows have the same one with a probability of n² / 2^129: below 10^-24 for
    ten million rows.
    """
    digest = blake2b(row.input_ids.tobytes(), digest_size=DIGEST_BYTES)
    digest.update(row.is_target.tobytes())
    digest.update(str(row.chosen_length).encode())
    return digest.digest()


@dataclass(frozen=True)
class Dropped:
    """Rows of a chunk that are not used."""

    unlabeled: int = 0
    """Rows of which no token counts in the loss."""
    first_unlabeled: str | None = None
    """Location of the first of them."""
    first_too_long: str | None = None
    """Location of the first row that is longer than a sequence may be."""


@dataclass(frozen=True)
class Limits:
    """Limits of a chunk's tokens. Training would fail beyond them."""

    vocabulary: int
    """Tokens that the model knows: every id is below."""
    longest: int
    """Tokens of a row."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows, tokenized and concatenated."""

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
    digests: Digests
    """uint8 [rows, 16]"""
    locations: Flags
    """uint8 [bytes]: file and line of each row, compressed."""
    dropped: Dropped = Dropped()
    chosen_lengths: Int32s | None = None
    """int32 [rows]: tokens of prompt and chosen answer of a preference, or None."""
    checks: Flags | None = None
    """uint8 [bytes]: the rows' checks as JSON, compressed, or None without any."""

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[TokenizedRow],
        too_long: Sequence[int] = (),
        dropped: Dropped = Dropped(),
        locations: Sequence[str] = (),
        checks: Sequence[str] | None = None,
    ) -> "Chunk":
        """The chunk of the used rows, their `locations`, and their `checks` as JSON if they bring any.

        `too_long`: tokens of each row that is left out because of its length.
        """
        chosen = [row.chosen_length for row in rows if row.chosen_length is not None]
        return cls(
            numpy.concatenate([numpy.empty(0, numpy.int32), *(row.input_ids for row in rows)]),
            numpy.concatenate([numpy.empty(0, numpy.uint8), *(row.is_target.astype(numpy.uint8) for row in rows)]),
            numpy.array([len(row.input_ids) for row in rows], dtype=numpy.int32),
            numpy.array([int(row.is_target.sum()) for row in rows], dtype=numpy.int32),
            numpy.array(too_long, dtype=numpy.int32),
            numpy.frombuffer(b"".join(map(row_digest, rows)), numpy.uint8).reshape(-1, DIGEST_BYTES),
            # The name of the file is in each of them: level 1 already leaves some five bytes per row.
            _compress(locations),
            dropped,
            numpy.array(chosen, dtype=numpy.int32) if chosen else None,
            None if checks is None else _compress(checks),
        )

    def location(self, row: int) -> str:
        """File and line of the row at `row`."""
        return _decompress(self.locations)[row]

    @property
    def rows_read(self) -> int:
        """Rows that were read, used or not."""
        return len(self.lengths) + len(self.too_long) + self.dropped.unlabeled

    def write(self, path: Path) -> None:
        """Write the chunk to disk, durably: whole or not at all. Raises OSError."""
        tensors = self._tensors()
        facts = {_DROPPED: asdict(self.dropped), _DIGEST: _digest(tensors, self.dropped)}
        # One entry: safetensors writes several in any order.
        write_atomically(path, save(tensors, metadata={_FACTS: json.dumps(facts, sort_keys=True)}))

    def _tensors(self) -> dict[str, NDArray[numpy.generic]]:
        names = ("input_ids", "is_target", "lengths", "target_counts", "too_long", "digests", "locations")
        tensors = {name: getattr(self, name) for name in (*names, "chosen_lengths", "checks")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def read(cls, path: Path, limits: Limits, *, verify: bool = False) -> "Chunk | None":
        """The chunk of a file, memory-mapped. None if there is no such file, or it is not whole or not `fits`.

        With `verify` it is compared with its digest, too, which finds what has damaged it and not who has forged it.
        Raises OSError if the volume fails.
        """
        try:
            if not path.is_file():
                return None
            with cast("TensorFile[Tensor]", safe_open(path, framework="pt")) as file:
                tensors = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - no mapping
                facts = json.loads((file.metadata() or {})[_FACTS])
                dropped = Dropped(**facts[_DROPPED])
                if verify and _digest(tensors, dropped) != facts[_DIGEST]:
                    return None
                chunk = cls(**tensors, dropped=dropped)
                return chunk if chunk.fits(limits) else None
        except (FileNotFoundError, PermissionError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            return None

    def fits(self, limits: Limits) -> bool:
        """Whether the arrays have their shapes, agree in length, and keep the limits."""
        if not self._has_shapes():
            return False
        if not len(self.lengths):
            return True
        starts = numpy.cumsum(self.lengths, dtype=numpy.int64) - self.lengths
        return bool(
            self.lengths.max() <= limits.longest
            and self.input_ids.min() >= 0
            and self.input_ids.max() < limits.vocabulary
            and self.is_target.max() <= 1
            and numpy.array_equal(numpy.add.reduceat(self.is_target, starts, dtype=numpy.int64), self.target_counts)
        )

    def _has_shapes(self) -> bool:
        chosen = self.lengths if self.chosen_lengths is None else self.chosen_lengths
        numbers = (self.input_ids, self.lengths, self.target_counts, self.too_long, chosen)
        flags = (self.is_target, self.locations, *(() if self.checks is None else (self.checks,)))
        if any(array.dtype != numpy.int32 or array.ndim != 1 for array in numbers):
            return False
        if any(array.dtype != numpy.uint8 or array.ndim != 1 for array in flags):
            return False
        rows, tokens = len(self.lengths), len(self.input_ids)
        return bool(
            self.digests.dtype == numpy.uint8
            and self.digests.shape == (rows, DIGEST_BYTES)
            and len(self.target_counts) == len(chosen) == rows
            and len(self.is_target) == self.lengths.sum(dtype=numpy.int64) == tokens
            and (self.lengths > 0).all()
            and ((chosen > 0) & (chosen <= self.lengths)).all()
        )


def _digest(tensors: Mapping[str, NDArray[numpy.generic]], dropped: Dropped) -> str:
    """BLAKE2b of what a chunk's file holds, in hexadecimal."""
    digest = blake2b(repr(dropped).encode(), digest_size=DIGEST_BYTES)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _compress(texts: Sequence[str]) -> Flags:
    return numpy.frombuffer(zlib.compress(_BETWEEN.join(texts).encode(errors="surrogateescape"), 1), numpy.uint8)


def _decompress(texts: Flags) -> list[str]:
    return zlib.decompress(texts.tobytes()).decode(errors="surrogateescape").split(_BETWEEN)


class TokenizedRows:
    """The rows of some chunks. Takes 16 bytes per row: tokens stay in the files."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = tuple(chunks)
        none = numpy.empty(0, numpy.int32)
        self.too_long: Int32s = numpy.concatenate([none, *(chunk.too_long for chunk in chunks)])
        """int32 [rows left out because they are too long]: their tokens"""
        self.dropped = tuple(chunk.dropped for chunk in chunks)
        """Which rows each chunk leaves out."""
        self.lengths: Int32s = numpy.concatenate([none, *(chunk.lengths for chunk in chunks)])
        self.target_counts: Int32s = numpy.concatenate([none, *(chunk.target_counts for chunk in chunks)])
        """int32 [rows]: tokens of each row that count in the loss"""
        chosen = [chunk.chosen_lengths for chunk in chunks if chunk.chosen_lengths is not None]
        self.chosen_lengths: Int32s | None = numpy.concatenate(chosen) if chosen else None
        """int32 [rows]: tokens of prompt and chosen answer of a preference, or None."""
        self._first = numpy.cumsum([0, *(len(chunk.lengths) for chunk in chunks)])
        ends = numpy.cumsum(self.lengths, dtype=numpy.int64)
        before = numpy.concatenate(([0], ends))[self._first[:-1]]
        self._starts = ends - self.lengths - numpy.repeat(before, numpy.diff(self._first))

    def __len__(self) -> int:
        """Used rows."""
        return len(self.lengths)

    @property
    def rows_read(self) -> int:
        """Rows that were read, used or not."""
        return sum(chunk.rows_read for chunk in self._chunks)

    @classmethod
    def from_parts(cls, parts: "Sequence[TokenizedRows]") -> "TokenizedRows":
        """The rows of all parts, one part after the other."""
        return cls([chunk for part in parts for chunk in part._chunks])

    def digests(self) -> Digests:
        """uint8 [rows, 16]: the digest of each row."""
        return numpy.concatenate([numpy.empty((0, DIGEST_BYTES), numpy.uint8), *(c.digests for c in self._chunks)])

    def location(self, row: int) -> str:
        """File and line of the row at `row`."""
        chunk = int(numpy.searchsorted(self._first, row, side="right")) - 1
        return self._chunks[chunk].location(row - int(self._first[chunk]))

    def checks(self, rows: RowIndices) -> list[str] | None:
        """The checks of the rows, as JSON, in their order, or None without any."""
        chunks = numpy.searchsorted(self._first, rows, side="right") - 1
        found = [""] * len(rows)
        for number in numpy.unique(chunks).tolist():
            compressed = self._chunks[number].checks
            if compressed is None:
                return None
            checks = _decompress(compressed)
            for index in numpy.flatnonzero(chunks == number).tolist():
                found[index] = checks[int(rows[index] - self._first[number])]
        return found

    def input_ids(self, rows: RowIndices) -> Int32s:
        """int32 [tokens]: the token ids of the rows, in their order."""
        return self._gather([chunk.input_ids for chunk in self._chunks], rows)

    def is_target(self, rows: RowIndices) -> Flags:
        """uint8 [tokens]: the target flags of the rows, in their order."""
        return self._gather([chunk.is_target for chunk in self._chunks], rows)

    def _gather(self, arrays: Sequence[NDArray[Number]], rows: RowIndices) -> NDArray[Number]:
        chunks = numpy.searchsorted(self._first, rows, side="right") - 1
        starts = self._starts[rows]
        ends = starts + self.lengths[rows]
        slices = zip(chunks.tolist(), starts.tolist(), ends.tolist(), strict=True)
        return numpy.concatenate([arrays[chunk][start:end] for chunk, start, end in slices])
