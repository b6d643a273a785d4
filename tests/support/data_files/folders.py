"""Addresses without a data file, or with the wrong ones."""

from tests.support.data_files.case import GOOD, BadData

ONE = {"train.jsonl": GOOD.encode()}
SOME = {"rows/a.jsonl": GOOD.encode(), "rows/b.jsonl": GOOD.encode() + b"3\n"}

FOLDERS = (
    BadData("no such file", ONE, "pvc://data/other.jsonl does not exist; its folder has train.jsonl", "other.jsonl"),
    BadData("no such folder", ONE, "pvc://data/no/other.jsonl does not exist; its folder has none", "no/other.jsonl"),
    BadData(
        "another ending",
        {"train.txt": b"a"},
        "pvc://data/train.txt does not end in .jsonl, .json or .csv, each also with .gz, .bz2, .xz or .zst appended,",
    ),
    BadData(
        "a compressed Parquet", {"train.parquet.gz": b"a"}, "pvc://data/train.parquet.gz does not end in .jsonl, .json"
    ),
    BadData("a pickle", {"train.pkl": b"a"}, "pvc://data/train.pkl does not end in .jsonl, .json or .csv"),
    BadData(
        "folder without data",
        {"rows/README.md": b"a", "rows/more/a.jsonl": b"a"},
        "pvc://data/rows has no data file; it has README.md, more; allowed are .jsonl, .json or .csv",
        "rows",
    ),
    BadData(
        "folder of several kinds",
        {"rows/a.jsonl": b"a", "rows/b.csv.gz": b"a"},
        "pvc://data/rows has files of several kinds, .csv and .jsonl: name one file, or a folder with one kind; it ha",
        "rows",
    ),
    BadData("wrong row in a folder", SOME, "pvc://data/rows/b.jsonl line 2 is a number: must be a JSON object", "rows"),
    BadData(
        "empty file in a folder", {**SOME, "rows/a.jsonl": b""}, "pvc://data/rows/a.jsonl has no rows (0 bytes)", "rows"
    ),
    BadData(
        "other digest",
        ONE,
        "but spec.dataset.sha256 is 0000000000000000000000000000000000000000000000000000000000000000: "
        "the data has changed",
        dataset={"sha256": "0" * 64},
    ),
    BadData(
        "too few rows to hold out",
        ONE,
        "pvc://data/train.jsonl has 1 usable row: to hold out a fraction (spec.dataset.eval.fraction) it needs at lea",
        dataset={"eval": {"fraction": 0.5}},
    ),
    BadData(
        "no evaluation file",
        ONE,
        "pvc://data/eval.jsonl does not exist; its folder has train.jsonl",
        dataset={"eval": {"source": "pvc://data/eval.jsonl"}},
    ),
    BadData(
        "wrong row for evaluation",
        {**ONE, "eval.jsonl": GOOD.encode() + b'{"messages": 1}\n'},
        "pvc://data/eval.jsonl line 2: 'messages' is a number: must be a list of {role, content}",
        dataset={"eval": {"source": "pvc://data/eval.jsonl"}},
    ),
)
