"""Compressed files that are cut off, damaged, mislabeled or made to fill a disk."""

import bz2
import gzip
import lzma

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from tests.support.data_files.case import GOOD, BadData, json_lines, one_file
from tests.support.data_files.good import zstandard

ROWS = "".join(GOOD.replace("pods?", f"pods of {number}?") for number in range(200)).encode()
BOMB = "has more than 67108864 bytes when it is decompressed, over 200 times its size"


def bomb() -> bytes:
    """Some kilobytes that become 65 MiB of lines; no test need tokenize their rows."""
    return gzip.compress(GOOD.encode() + (b" " * 2**20 + b"\n") * 65)


def column_bomb() -> bytes:
    """Return a Parquet file of some kilobytes, with one text of a megabyte per row."""
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["a"] * 70, "filler": [" " * 2**20] * 70})
    with ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def compressed(name: str, ending: str, content: bytes, message: str) -> BadData:
    """A file with that ending; the message begins with its name."""
    return one_file(name, f"train.jsonl{ending}", content, f"pvc://data/train.jsonl{ending} {message}")


def cut(name: str, ending: str, content: bytes) -> BadData:
    """A compressed file without its latter half."""
    return compressed(name, ending, content[: len(content) // 2], "cannot be decompressed (")


COMPRESSED = (
    cut("gzip that is cut off", ".gz", gzip.compress(ROWS)),
    cut("bzip2 that is cut off", ".bz2", bz2.compress(ROWS)),
    cut("xz that is cut off", ".xz", lzma.compress(ROWS)),
    cut("zstd that is cut off", ".zst", zstandard(ROWS)),
    compressed(
        "text called gzip",
        ".gz",
        GOOD.encode(),
        "cannot be decompressed (Not a gzipped file (b'{\"')): it is cut off, damaged, or",
    ),
    compressed("gzip called zstd", ".zst", gzip.compress(ROWS), "cannot be decompressed ("),
    json_lines("gzip called text", gzip.compress(ROWS), " line 1: byte 0x8b at byte 1 of the file is not UTF-8"),
    compressed("nothing in gzip", ".gz", gzip.compress(b""), "has no rows ("),
    compressed("wrong row in gzip", ".gz", gzip.compress(GOOD.encode() + b"3\n"), "line 2 is a num"),
    compressed("decompression bomb", ".gz", bomb(), BOMB),
    one_file("Parquet bomb", "train.parquet", column_bomb(), f"pvc://data/train.parquet {BOMB}"),
)
