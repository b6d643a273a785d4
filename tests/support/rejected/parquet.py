"""Parquet files that are damaged, contradictory, or small and fill the memory."""

import gzip
import io
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def zstandard(content: bytes) -> bytes:
    """Compressed as zstd does."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def table(columns: Mapping[str, Any], **options: Any) -> bytes:
    """A file of these columns; one without values is of texts."""
    stream = io.BytesIO()
    arrays = {name: values if len(values) else pa.array([], pa.string()) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), stream, **options)
    return stream.getvalue()


def _damaged_parquet() -> bytes:
    whole = table({"text": ["some text"] * 300})
    return whole[:4] + b"\xff" * 40 + whole[44:]


def _contradictory_footer() -> bytes:
    """A column that cannot be null (field 3 of the schema's element) and a count of nulls in it."""
    whole = table({"messages": [[{"role": "user", "content": "q"}]]})
    return whole.replace(b"\x35\x02\x18\x08messages", b"\x34\x02\x18\x08messages")


def _small_bomb() -> bytes:
    """Some kilobytes that become 65 MiB of lines; no test need tokenize their rows."""
    return gzip.compress(b'{"text": "a"}\n' + (b" " * 2**20 + b"\n") * 65)


def _huge_page() -> bytes:
    """The only page's header declares 2 GiB, and the footer has no such size."""
    content = table({"text": ["word"] * 100}, compression="zstd", use_dictionary=False)
    # Three numbers of seven bits a byte, doubled: the type, the size in two bytes, and the compressed size in one.
    type_, more, last, compressed = content[5], content[7], content[8], content[10]
    assert (type_, more >> 7, last >> 7, compressed >> 7) == (0, 1, 0, 0)
    length = pq.read_metadata(io.BytesIO(content)).row_group(0).column(0).total_compressed_size
    # The page is shorter by the bytes that its size is longer, so that nothing else moves.
    begin = b"PAR1\x15\x00\x15\xfe\xff\xff\xff\x0f\x15" + bytes([compressed - 2 * 3])
    return begin + content[11 : 4 + length - 3] + content[4 + length :]


def _repeated_values() -> bytes:
    """A thousand rows with the same 60 MB in two columns, which are stored once."""
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), ["a" * 30_000_000])
    columns = {"text": ["word"] * 1000, "one": value, "two": value}
    return table(columns, compression="zstd", dictionary_pagesize_limit=2**30)


def _mislabeled_values() -> bytes:
    """The same; the footer gives each column's pages another type, which pyarrow ignores."""
    content = _repeated_values()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    text, number = b"\x15\x0c\x19", b"\x15\x02\x19"
    assert content.count(text, footer) == 3
    return content[:footer] + content[footer:].replace(text, number)


BUILT: Mapping[str, Callable[[], bytes]] = {
    "damaged_parquet": _damaged_parquet,
    "contradictory_footer": _contradictory_footer,
    "column_bomb": lambda: table({"text": ["a"] * 70, "filler": [" " * 2**20] * 70}, compression="zstd"),
    "small_bomb": _small_bomb,
    "huge_page": _huge_page,
    "repeated_values": _repeated_values,
    "mislabeled_values": _mislabeled_values,
}
"""Files by their names in the tables."""
