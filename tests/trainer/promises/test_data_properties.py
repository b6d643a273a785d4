"""Readers of data over many inputs: rows as they were written, or a rejection with a reason."""

import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import Columns
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.examples.formats import RowReader, detect_format
from qlora_trainer.data.packing import pack
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset, write_split
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.reading import read_rows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.tokenize.chunks import Chunk, Limits, TokenizedRows

UNTIMED = settings(deadline=None)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "id"))
SAID = st.sampled_from(
    ("system", "user", "assistant", "tool", "human", "gpt", "function_call", '{"name": "f"}', "text", "")
)
TURNS = st.recursive(
    SAID | JSON,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=16,
)
COLUMNS = st.sampled_from(sorted(Columns.model_fields))


Result = TypeVar("Result")


def rejected_or(action: Callable[[], Result], beginning: str = "pvc://data/") -> Result | None:
    """Result of the action; None if it rejects the data set in words for people."""
    rejection: StepFailure | None = None
    try:
        return action()
    except StepFailure as failure:
        rejection = failure
    assert rejection.exit_code is ExitCode.BAD_DATASET
    assert rejection.message.startswith(beginning)
    assert len(rejection.message) < 1000
    return None


def read(name: str, content: bytes) -> list[Mapping[str, object]] | None:
    """The rows of a file with this name and content; None if it is rejected."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        return rejected_or(lambda: [row.values() for row in read_rows([DataFile(path, f"pvc://data/{name}")])])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@UNTIMED
@given(content=st.text(alphabet='[]{}",:\\ \n\r\t\ufeffab01.-eu\u2028\ud83d\ude00é', max_size=60))
@example(content='[{"a":1},\n\n{"a":"\u2028"}]')
def test_any_text_of_jsons_characters_is_rows_or_rejected(name: str, content: str) -> None:
    rows = read(name, content.encode(errors="surrogatepass"))
    assert rows is None or rows


@UNTIMED
@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=4), min_size=1, max_size=6), st.booleans())
def test_written_json_is_read_back(rows: list[dict[str, Any]], indented: bool) -> None:
    """Apart from NaN and infinity, which JSON does not have."""
    try:
        text = json.dumps(rows, allow_nan=False, indent=1 if indented else None)
    except ValueError:
        return
    found = read("a.json", text.encode())
    assert found is not None
    assert found == rows
    lines = "\n".join(json.dumps(row) for row in rows)
    assert read("a.jsonl.gz", gzip.compress(lines.encode())) == rows


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_a_damaged_parquet_file_is_rows_or_rejected(position: int, byte: int) -> None:
    content = bytearray(PARQUET)
    content[position % len(content)] = byte
    rows = read("a.parquet", bytes(content))
    assert rows is None or rows


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["some text", "more"] * 20, "n": [[1, None]] * 40}), sink)
    return bytes(sink.getvalue())


PARQUET = _parquet()


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(COLUMNS, TURNS, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_any_row_is_an_example_or_rejected(values: dict[str, Any], columnar: bool, pairs: bool) -> None:
    row = Row("pvc://data/a.jsonl line 1", values, 1, columnar)
    detected = rejected_or(lambda: detect_format(row, None, pairs=pairs))
    if detected is not None:
        reader = RowReader(*detected)
        read_example = rejected_or(lambda: reader.read(row))
        assert read_example is None or reader.reading(row).columns


ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=32), min_size=1, max_size=40
)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 7), st.integers(0, 99))
def test_every_row_lands_once_with_its_own_mask(rows: list[list[tuple[int, bool]]], chunk_rows: int, seed: int) -> None:
    """Through chunks on disk, packing and the split's file, the mask stays aligned."""
    pairs = [([token for token, _ in row], [flag for _, flag in row]) for row in rows]
    tokens = [TokenizedRow(numpy.array(ids, numpy.int32), numpy.array(flags, numpy.bool_)) for ids, flags in pairs]
    with tempfile.TemporaryDirectory() as folder:
        chunks = []
        for first in range(0, len(pairs), chunk_rows):
            path = Path(folder, f"{first}.safetensors")
            Chunk.from_rows(tokens[first : first + chunk_rows]).write(path)
            chunks.append(Chunk.read(path, Limits(vocabulary=501, longest=32)))
        assert None not in chunks
        tokenized = TokenizedRows([chunk for chunk in chunks if chunk is not None])
        arrangement = pack(numpy.arange(len(rows)), tokenized.lengths, 32, seed)
        write_split(Path(folder, "train.safetensors"), tokenized, arrangement)
        data = PreparedDataset(Path(folder, "train.safetensors"))
        found = []
        for index in range(len(data)):
            sequence = data[index]
            assert sum(sequence.row_lengths) == len(sequence.input_ids) <= 32
            ids, labels = sequence.input_ids.tolist(), sequence.labels.tolist()
            ends = numpy.cumsum(sequence.row_lengths).tolist()
            for length, end in zip(sequence.row_lengths, ends, strict=True):
                own = slice(end - length, end)
                found.append((ids[own], [label != IGNORED_LABEL for label in labels[own]]))
                assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids[own], labels[own], strict=True))
    assert found == [pairs[row] for row in arrangement.rows]
    assert sorted(found) == sorted(pairs)
    assert data.target_tokens == sum(sum(flags) for _, flags in pairs)
