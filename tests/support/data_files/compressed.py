"""Compressed files that are cut off, damaged, mislabeled or made to fill a disk."""

import bz2
import gzip
import lzma

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from tests.support.data_files.case import GOOD, BadData, one_file

ROWS = "".join(GOOD.replace("pods?", f"pods of {number}?") for number in range(200)).encode()


def zstandard(content: bytes) -> bytes:
    """Compressed as zstd does."""
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def bomb() -> bytes:
    """Some kilobytes that become 65 MiB of lines; no test need tokenize their rows."""
    return gzip.compress(GOOD.encode() + (b" " * 2**20 + b"\n") * 65)


def column_bomb() -> bytes:
    """A Parquet file of some kilobytes whose rows have one additional text of a megabyte."""
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["a"] * 70, "filler": [" " * 2**20] * 70})
    with ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def cut(name: str, ending: str, content: bytes) -> BadData:
    """A compressed file without its latter half."""
    return one_file(
        name,
        f"train.jsonl{ending}",
        content[: len(content) // 2],
        f"pvc://data/train.jsonl{ending} cannot be decompressed (",
    )


COMPRESSED = (
    cut("gzip that is cut off", ".gz", gzip.compress(ROWS)),
    cut("bzip2 that is cut off", ".bz2", bz2.compress(ROWS)),
    cut("xz that is cut off", ".xz", lzma.compress(ROWS)),
    cut("zstd that is cut off", ".zst", zstandard(ROWS)),
    one_file(
        "text called gzip",
        "train.jsonl.gz",
        GOOD,
        "pvc://data/train.jsonl.gz cannot be decompressed (Not a gzipped file (b'{\"')): it is cut off, damaged, or",
    ),
    one_file(
        "gzip called zstd",
        "train.jsonl.zst",
        gzip.compress(ROWS),
        "pvc://data/train.jsonl.zst cannot be decompressed (",
    ),
    one_file(
        "gzip called text",
        "train.jsonl",
        gzip.compress(ROWS),
        "pvc://data/train.jsonl line 1: byte 0x8b at byte 1 of the file is not UTF-8",
    ),
    one_file("nothing in gzip", "train.jsonl.gz", gzip.compress(b""), "pvc://data/train.jsonl.gz has no rows ("),
    one_file(
        "wrong row in gzip", "train.jsonl.gz", gzip.compress(GOOD.encode() + b"3\n"), "train.jsonl.gz line 2 is a num"
    ),
    one_file(
        "decompression bomb",
        "train.jsonl.gz",
        bomb(),
        "pvc://data/train.jsonl.gz has more than 67108864 bytes when it is decompressed, over 200 times its size",
    ),
    one_file(
        "Parquet bomb",
        "train.parquet",
        column_bomb(),
        "pvc://data/train.parquet has more than 67108864 bytes when it is decompressed, over 200 times its size",
    ),
)
