"""The prepared data on disk: how token sequences are written once and read many times; changes with their format.

A data folder holds `train.safetensors`, `eval.safetensors` where rows are held out, and `manifest.json`, which is
written last. A split's file has the tensors

    input_ids        int32 [tokens]          all sequences, one after the other, without padding
    is_target        uint8 [tokens]          1 where the token counts in the loss
    segment_lengths  int32 [rows]            tokens of each row, in the order of the tokens
    token_offsets    int64 [sequences + 1]   where a sequence begins in `input_ids`
    segment_offsets  int64 [sequences + 1]   where a sequence begins in `segment_lengths`
"""

import json
from array import array
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IGNORED_LABEL = -100

_FACTS = "prepared"

Split = Literal["train", "eval"]


def split_file(folder: Path, split: Split) -> Path:
    """The file of a split in a data folder."""
    return folder / f"{split}.safetensors"


@dataclass(frozen=True)
class Sequence:
    """One packed sequence: its rows stand one after the other and must not see each other."""

    input_ids: Tensor
    """int64 [tokens]"""
    labels: Tensor
    """int64 [tokens], aligned with `input_ids`; -100 where the token is no target, as the first of every row."""
    segment_lengths: tuple[int, ...]
    """Tokens of each row in it; position ids restart at each."""


class TokenizedRows:
    """Rows of tokens in memory, 5 bytes a token."""

    def __init__(self) -> None:
        self._input_ids = array("i")
        self._is_target = bytearray()
        self._offsets = array("q", [0])

    def append(self, input_ids: Items[int], is_target: Items[bool]) -> None:
        """Add one row. Raises ValueError if the two differ in length."""
        if len(input_ids) != len(is_target):
            raise ValueError(f"{len(input_ids)} tokens but {len(is_target)} target flags")
        self._input_ids.extend(input_ids)
        self._is_target.extend(is_target)
        self._offsets.append(len(self._input_ids))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [end - start for start, end in zip(self._offsets, self._offsets[1:], strict=False)]

    def tokens(self, row: int) -> "array[int]":
        """The row's token ids."""
        return self._input_ids[self._offsets[row] : self._offsets[row + 1]]

    def targets(self, row: int) -> bytearray:
        """The row's target flags, 0 or 1."""
        return self._is_target[self._offsets[row] : self._offsets[row + 1]]


def write_split(path: Path, rows: TokenizedRows, sequences: Items[Items[int]]) -> None:
    """Write the file of a split. `sequences` lists the rows that each sequence holds, as indices into `rows`.

    Raises OSError (or safetensors' own error) if the disk is full. The caller makes it durable and renames.
    """
    input_ids, is_target = array("i"), bytearray()
    order = [row for sequence in sequences for row in sequence]
    for row in order:
        input_ids.extend(rows.tokens(row))
        is_target.extend(rows.targets(row))
    lengths = rows.lengths
    tensors = {
        "input_ids": torch.frombuffer(input_ids, dtype=torch.int32),
        "is_target": torch.frombuffer(is_target, dtype=torch.uint8),
        "segment_lengths": torch.tensor([lengths[row] for row in order], dtype=torch.int32),
        "token_offsets": _offsets([sum(lengths[row] for row in sequence) for sequence in sequences]),
        "segment_offsets": _offsets([len(sequence) for sequence in sequences]),
    }
    facts = {"format": FORMAT_VERSION, "targetTokens": sum(is_target)}
    # One entry only: safetensors writes several in an order that changes from run to run.
    save_file(tensors, path, metadata={_FACTS: json.dumps(facts, sort_keys=True)})
    # safetensors lets nobody but the owner read it; a later step may run as another user of the same group.
    path.chmod(0o644)


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int64)


class PreparedDataset:
    """The sequences of one split, read from the memory-mapped file as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file of a split. Raises FileNotFoundError, or ValueError if another version wrote it."""
        self._file = cast("Any", safe_open(path, framework="pt"))
        facts = json.loads((self._file.metadata() or {}).get(_FACTS, "{}"))
        if facts.get("format") != FORMAT_VERSION:
            found = facts.get("format", "unknown")
            raise ValueError(f"{path} has format {found}, this program reads {FORMAT_VERSION}: prepare the data again")
        self.target_tokens: int = facts["targetTokens"]
        """Tokens that count in the loss."""
        self._segment_lengths: list[int] = self._file.get_tensor("segment_lengths").tolist()
        self._token_offsets: list[int] = self._file.get_tensor("token_offsets").tolist()
        self._segment_offsets: list[int] = self._file.get_tensor("segment_offsets").tolist()

    @classmethod
    def open(cls, folder: Path, split: Split) -> "PreparedDataset":
        """The split of a data folder."""
        return cls(split_file(folder, split))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self._token_offsets[-1]

    @property
    def rows(self) -> int:
        """Rows in all sequences."""
        return len(self._segment_lengths)

    def __len__(self) -> int:
        return len(self._token_offsets) - 1

    def __getitem__(self, index: int) -> Sequence:
        """The sequence at `index`, from 0. Raises IndexError beyond the last one."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start, end = self._token_offsets[index], self._token_offsets[index + 1]
        input_ids = self._file.get_slice("input_ids")[start:end].to(torch.int64)
        is_target = self._file.get_slice("is_target")[start:end].bool()
        segments = self._segment_lengths[self._segment_offsets[index] : self._segment_offsets[index + 1]]
        return Sequence(input_ids, input_ids.masked_fill(~is_target, IGNORED_LABEL), tuple(segments))
