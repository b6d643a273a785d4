"""The prepared data on disk: packed sequences, written once and read many times.

A data folder has `train.safetensors`, `eval.safetensors` if rows are held out, `guard-NAME.safetensors` for each guard
of the gate, `statistics.json`, and `manifest.json`, which is written last. A split's file has the tensors

    token_offsets    int64 [sequences + 1]   where a sequence begins in `input_ids`
    segment_offsets  int64 [sequences + 1]   where a sequence begins in `segment_lengths`
    input_ids        int32 [tokens]          all sequences, one after the other, without padding
    segment_lengths  int32 [rows]            tokens of each row, in the order of the tokens
    is_target        uint8 [tokens]          1 where the token counts in the loss

If the rows bring the checks of their answers, the held-out split also has

    check_offsets    int64 [rows + 1]        where a row's check begins in `checks`
    checks           uint8 [bytes]           of each row its check as JSON, in UTF-8

A row of format preference is stored as two, which follow each other in one sequence: the prompt with the chosen answer,
and the prompt with the rejected one.

With a mix, each epoch has different sequences. A sequence above is then one row, stored once, with these tensors:

    sequence_offsets int64 [sequences + 1]   where a sequence begins in `sequence_rows`; all of one epoch, then the next
    epoch_offsets    int64 [epochs + 1]      the first sequence of each epoch
    sequence_rows    int32 [rows of all epochs]  the rows of a sequence
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, cast

import numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_api.printable import first_line
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.data.epochs import EpochArrangements
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.packing import Arrangement
from qlora_trainer.data.tokenize.chunks import TokenizedRows

FORMAT_VERSION = 2
PREPARED_MANIFEST = "manifest.json"
IGNORED_LABEL = -100
_FACTS = "prepared"
_GATHERED_ROWS = 2**13
Split = Literal["train", "eval"]


def guard_split(name: str) -> str:
    """The split with the rows of this guard."""
    return f"guard-{name}"


def split_file(folder: Path, split: str) -> Path:
    """The file of a split in a data folder."""
    return folder / f"{split}.safetensors"


@dataclass(frozen=True)
class PackedSequence:
    """One packed sequence: its rows are concatenated and must not see each other."""

    input_ids: Tensor
    """int64 [tokens]"""
    labels: Tensor
    """int64 [tokens], aligned with `input_ids`, -100 where the token is not a target.

    The first token of every row is none.
    """
    row_lengths: tuple[int, ...]
    """Tokens of each row in it. Position ids restart at each row."""
    row_numbers: tuple[int, ...] | None = None
    """Row numbers in the split, if chosen and rejected alternate, or None."""

    @classmethod
    def from_parts(cls, parts: "Sequence[PackedSequence]") -> "PackedSequence":
        """The sequence with the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.input_ids for part in parts]),
            torch.cat([part.labels for part in parts]),
            tuple(length for part in parts for length in part.row_lengths),
            None
            if any(part.row_numbers is None for part in parts)
            else tuple(number for part in parts for number in part.row_numbers or ()),
        )


def write_split(
    path: Path,
    rows: TokenizedRows,
    arrangement: Arrangement,
    epochs: EpochArrangements | None = None,
    checks: Sequence[str] | None = None,
) -> None:
    """Write the file of a split: the sequences of the arrangement, whose rows are indices into `rows`.

    `checks`: of each row of the arrangement, as JSON, if the rows bring any.

    With `epochs`, the arrangement has one row in each sequence, and the sequences of each epoch consist of these.
    Copies the tokens of some rows at a time. Raises OSError if the disk is full. The caller syncs the file to disk.
    """
    order = arrangement.rows
    lengths = rows.lengths[order]
    token_offsets = numpy.concatenate(([0], numpy.cumsum(lengths, dtype=numpy.int64)))[arrangement.offsets]
    tokens = int(token_offsets[-1])
    facts = {"format": FORMAT_VERSION, "targetTokens": int(rows.target_counts[order].sum(dtype=numpy.int64))}
    segments, segment_offsets = lengths, arrangement.offsets
    if rows.chosen_lengths is not None:
        chosen = rows.chosen_lengths[order]
        segments, segment_offsets = numpy.stack((chosen, lengths - chosen), axis=1).ravel(), 2 * arrangement.offsets
        facts["pairs"] = 1
    batches = [order[first : first + _GATHERED_ROWS] for first in range(0, len(order), _GATHERED_ROWS)]
    in_utf8 = [check.encode() for check in checks or ()]
    check_offsets = numpy.cumsum([0, *map(len, in_utf8)], dtype=numpy.int64)
    tensors = (
        _Tensor.from_array("token_offsets", "I64", token_offsets),
        _Tensor.from_array("segment_offsets", "I64", segment_offsets),
        _Tensor.from_array("sequence_offsets", "I64", None if epochs is None else epochs.sequence_offsets),
        _Tensor.from_array("epoch_offsets", "I64", None if epochs is None else epochs.epoch_offsets),
        _Tensor.from_array("check_offsets", "I64", None if checks is None else check_offsets),
        _Tensor("input_ids", "I32", tokens, map(rows.input_ids, batches)),
        _Tensor.from_array("segment_lengths", "I32", segments),
        _Tensor.from_array("sequence_rows", "I32", None if epochs is None else epochs.rows),
        _Tensor("is_target", "U8", tokens, map(rows.is_target, batches)),
        _Tensor.from_array("checks", "U8", None if checks is None else numpy.frombuffer(b"".join(in_utf8), "u1")),
    )
    with path.open("wb") as file:
        file.write(_header(tensors, facts))
        for tensor in tensors:
            for part in tensor.parts:
                file.write(part.astype(_NUMPY_TYPES[tensor.dtype], copy=False).data)


_NUMPY_TYPES = {"I64": "<i8", "I32": "<i4", "U8": "u1"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of one dimension, in parts that are made when they are written."""

    name: str
    dtype: Literal["I64", "I32", "U8"]
    count: int | None
    """None for a tensor that the file does not have."""
    parts: Iterable[NDArray[numpy.integer]]

    @classmethod
    def from_array(cls, name: str, dtype: Literal["I64", "I32", "U8"], array: NDArray[numpy.integer] | None) -> Self:
        """The tensor of a whole array, or none."""
        return cls(name, dtype, None, ()) if array is None else cls(name, dtype, len(array), (array,))


def _header(tensors: Sequence[_Tensor], facts: dict[str, int]) -> bytes:
    """The header by https://github.com/huggingface/safetensors#format."""
    entries: dict[str, object] = {"__metadata__": {_FACTS: json.dumps(facts, sort_keys=True)}}
    offset = 0
    for tensor in tensors:
        if tensor.count is not None:
            end = offset + numpy.dtype(_NUMPY_TYPES[tensor.dtype]).itemsize * tensor.count
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": [tensor.count], "data_offsets": [offset, end]}
            offset = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class PreparedDataset:
    """The sequences of one split, read from the memory-mapped file on access only."""

    def __init__(self, path: Path) -> None:
        """Open a split's file. Raises FileNotFoundError, or ValueError if unreadable."""
        try:
            self._open(path)
        except (SafetensorError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error!r})") from error

    def _open(self, path: Path) -> None:
        file = cast("TensorFile[Tensor]", safe_open(path, framework="pt"))
        facts = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
        if facts.get("format") != FORMAT_VERSION:
            found = facts.get("format", "unknown")
            raise ValueError(f"{path} has format {found}, this program reads {FORMAT_VERSION}")
        self.target_tokens: int = facts["targetTokens"]
        """Tokens that count in the loss."""
        self.pairs = "pairs" in facts
        """Whether its rows are chosen and rejected in turn."""
        self._input_ids, self._is_target = file.get_tensor("input_ids"), file.get_tensor("is_target")
        self._segment_lengths = file.get_tensor("segment_lengths")
        self._token_offsets = file.get_tensor("token_offsets")
        self._segment_offsets = file.get_tensor("segment_offsets")
        names = file.keys()
        self._drawn: tuple[Tensor, Tensor] | None = None
        self.epoch_offsets: tuple[int, ...] = ()
        """First sequence of each epoch, and the end. Empty if each epoch has all of them."""
        if "epoch_offsets" in names:
            self._drawn = file.get_tensor("sequence_offsets"), file.get_tensor("sequence_rows")
            self.epoch_offsets = tuple(file.get_tensor("epoch_offsets").tolist())
        self._checks: tuple[Tensor, Tensor] | None = None
        if "checks" in names:
            self._checks = file.get_tensor("check_offsets"), file.get_tensor("checks")
        # Raises TypeError for offsets that are no list.
        len(self)

    @classmethod
    def open(cls, folder: Path, split: str) -> "PreparedDataset":
        """The split of a data folder."""
        return cls(split_file(folder, split))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self._input_ids)

    @property
    def rows(self) -> int:
        """Rows in all sequences, each counted once."""
        return len(self._segment_lengths)

    def __len__(self) -> int:
        """The number of sequences. With a mix it is that of all epochs."""
        return len(self._token_offsets if self._drawn is None else self._drawn[0]) - 1

    def __getitem__(self, index: int) -> PackedSequence:
        """The sequence at `index`, from 0. Raises IndexError beyond the last one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return PackedSequence.from_parts([self._stored_sequence(stored) for stored in self._stored(index)])

    def _stored_sequence(self, index: int) -> PackedSequence:
        start, end = self._token_offsets[index : index + 2].tolist()
        rows = self._stored_rows(index)
        input_ids = self._input_ids[start:end].to(torch.int64)
        labels = input_ids.masked_fill(self._is_target[start:end] == 0, IGNORED_LABEL)
        row_lengths = tuple(self._segment_lengths[rows.start : rows.stop].tolist())
        return PackedSequence(input_ids, labels, row_lengths, tuple(rows) if self.pairs else None)

    def row_numbers(self, index: int) -> Sequence[int]:
        """The numbers, in the split, of the rows in the sequence at `index`."""
        return [number for stored in self._stored(index) for number in self._stored_rows(stored)]

    def check(self, row: int) -> RowCheck | None:
        """The check of a row of the split, or None. A pair counts as one row."""
        if self._checks is None:
            return None
        offsets, checks = self._checks
        start, end = offsets[row : row + 2].tolist()
        return RowCheck.load(checks[start:end].numpy().tobytes().decode())

    def _stored_rows(self, index: int) -> range:
        first, past = self._segment_offsets[index : index + 2].tolist()
        return range(first, past)

    def _stored(self, index: int) -> list[int]:
        """Return the stored sequences of the one at `index`: several if epochs are drawn."""
        if self._drawn is None:
            return [index]
        offsets, rows = self._drawn
        first, past = offsets[index : index + 2].tolist()
        drawn: list[int] = rows[first:past].tolist()
        return drawn


def open_prepared(folder: Path, split: str) -> PreparedDataset:
    """A split for later steps. Raises FileNotFoundError, or StepFailure BAD_DATASET."""
    try:
        return PreparedDataset.open(folder, split)
    except ValueError as error:
        raise bad_dataset(
            f"{first_line(error)}; set a new spec.retry.request, or use qlora run --resume: prepare makes the "
            "rows again"
        ) from error
