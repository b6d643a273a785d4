"""Data sets that were made to do harm: each is rejected by the right guard, and nothing is written elsewhere.

As for models, in the `prepare` step and under a limit of memory and of time.
"""

import bz2
import gzip
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_api.contract import ExitCode
from tests.support.runs.hostile import Case, Payload, Place, collector, new_trial
from tests.trainer.conftest import MakeContext

UNSAFE, DATASET = ExitCode.UNSAFE_ARTIFACT, ExitCode.BAD_DATASET
CASES: dict[str, Case] = {}
case = collector(CASES)


# Code


@case(DATASET, "is not UTF-8")
def a_pickled_data_set(place: Place) -> None:
    place.rows(pickle.dumps(Payload(place.canary)))


# Paths


@case(UNSAFE, "is a link that leads out of its folder")
def data_that_are_a_link(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    (place.data / "train.jsonl").symlink_to(place.outside / "secret")


@case(UNSAFE, "is not a regular file")
def data_that_are_a_pipe(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    os.mkfifo(place.data / "train.jsonl")


@case(UNSAFE, "is a link that leads out of its folder")
def data_that_are_an_endless_device(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    (place.data / "train.jsonl").symlink_to("/dev/zero")


@case(DATASET, "is not UTF-8")
def an_archive_that_climbs(place: Place) -> None:
    with zipfile.ZipFile(place.outside / "rows.zip", "w") as archive:
        archive.writestr("../../outside/canary", "x")
    place.rows((place.outside / "rows.zip").read_bytes())


@case(DATASET, "not valid JSON (Expecting value)")
def a_tar_in_a_compressed_file(place: Place) -> None:
    (place.data / "train.jsonl").unlink()
    with tarfile.open(place.data / "train.jsonl.gz", "w:gz") as archive:
        archive.add(place.outside / "secret", "../../outside/canary")


# Bombs


def bomb(compress: Callable[[bytes], bytes], ending: str, place: Place) -> None:
    """Write one row and 4 GiB of blank lines, in parts that are decompressed in turn."""
    blank = compress((b" " * (2**20 - 1) + b"\n") * 16)
    place.rows(compress((place.data / "train.jsonl").read_bytes()) + blank * 256, f"train.jsonl{ending}")


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESSIONS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": (".gz", gzip.compress),
    "bzip2": (".bz2", bz2.compress),
    "xz": (".xz", lzma.compress),
    "zstandard": (".zst", zstandard),
}
CASES |= {
    f"a {name} bomb": Case(partial(bomb, compress, ending), DATASET, "bytes when it is decompressed")
    for name, (ending, compress) in COMPRESSIONS.items()
}


@case(DATASET, "is longer than 16 MiB")
def a_line_without_end(place: Place) -> None:
    with (place.data / "train.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(2**32)


@case(DATASET, "the nesting too deep")
def rows_that_nest_without_end(place: Place) -> None:
    place.rows(b'{"text": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}\n")


@case(DATASET, "Exceeds the limit (4300 digits)")
def a_number_of_a_million_digits(place: Place) -> None:
    place.rows(b'{"text": "a", "n": ' + b"9" * 1_000_000 + b"}\n")


@case(DATASET, "reading it took more than 1.0 GiB of host memory")
def a_parquet_page_that_says_it_is_huge(place: Place) -> None:
    """The only page's header declares 2 GiB, and the footer has no such size."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ["word"] * 100})
    pyarrow.parquet.write_table(table, sink, compression="zstd", use_dictionary=False)
    content = bytes(sink.getvalue())
    # Three numbers of seven bits a byte, doubled: the type, the size in two bytes, and the compressed size in one.
    type_, more, last, compressed = content[5], content[7], content[8], content[10]
    assert (type_, more >> 7, last >> 7, compressed >> 7) == (0, 1, 0, 0)
    length = pyarrow.parquet.read_metadata(pyarrow.BufferReader(content)).row_group(0).column(0).total_compressed_size
    # The page is shorter by the bytes that its size is longer, so that nothing else moves.
    begin = b"PAR1\x15\x00\x15\xfe\xff\xff\xff\x0f\x15" + bytes([compressed - 2 * 3])
    place.rows(begin + content[11 : 4 + length - 3] + content[4 + length :], "train.parquet")


@case(DATASET, "reading it took more than 1.0 GiB of host memory")
def a_parquet_value_that_every_row_has(place: Place) -> None:
    """A thousand rows with the same 60 MB in two columns, which are stored once."""
    write_repeated_values(place)


@case(DATASET, "reading it took more than 1.0 GiB of host memory")
def a_parquet_value_that_every_row_has_in_a_column_called_int32(place: Place) -> None:
    """The footer gives each column's pages another type, which pyarrow ignores."""
    write_repeated_values(place)
    path = place.data / "train.parquet"
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    text, number = b"\x15\x0c\x19", b"\x15\x02\x19"
    assert content.count(text, footer) == 3
    path.write_bytes(content[:footer] + content[footer:].replace(text, number))


def write_repeated_values(place: Place) -> None:
    value = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["a" * 30_000_000])
    table = pyarrow.table({"text": ["word"] * 1000, "one": value, "two": value})
    (place.data / "train.jsonl").unlink()
    pyarrow.parquet.write_table(
        table, place.data / "train.parquet", compression="zstd", dictionary_pagesize_limit=2**30
    )


# Encodings


@case(DATASET, "is not UTF-8")
def data_in_no_encoding(place: Place) -> None:
    place.rows(b'{"text": "\xc3\x28"}\n')


@case(DATASET, "has an unpaired surrogate")
def half_of_a_character(place: Place) -> None:
    place.rows(b'{"text": "\\ud800"}\n')


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_data_set_is_rejected_and_does_nothing(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    new_trial(tmp_path, tiny_llama, make_context, monkeypatch).require_rejection(CASES[name])
