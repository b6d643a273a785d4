"""The same rows in a file of each kind."""

import bz2
import gzip
import json
import lzma
from collections.abc import Mapping

from tests.support.rejected.parquet import table, zstandard

ROWS = [{"prompt": f'Question "{n}",\nplease', "completion": f"ünswer {n}"} for n in range(3)]
_LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
_PLAIN = "\n".join(_LINES).encode()
_CELLS = ['"{}","{}"'.format(*(row[key].replace('"', '""') for key in ("prompt", "completion"))) for row in ROWS]
_MARK = b"\xef\xbb\xbf"


GOOD_FILES: Mapping[str, tuple[bytes, ...]] = {
    ".jsonl": (_PLAIN, _MARK + "\r\n\r\n".join(_LINES).encode() + b"\r\n"),
    ".json": (
        json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        _MARK + b"\r\n [" + ",".join(_LINES).encode() + b"] \n",
        _PLAIN,
    ),
    ".csv": (_MARK + "\n".join(["prompt,completion", *_CELLS]).encode(),),
    ".parquet": (table({key: [row[key] for row in ROWS] for key in ROWS[0]}),),
    ".jsonl.gz": (gzip.compress(_PLAIN[:50]) + gzip.compress(_PLAIN[50:]),),
    ".jsonl.bz2": (bz2.compress(_PLAIN),),
    ".json.xz": (lzma.compress(json.dumps(ROWS).encode()),),
    ".csv.zst": (zstandard("\r\n".join(["prompt,completion", *_CELLS]).encode()),),
}
"""By the ending of the file's name: also with a byte order mark, blank lines and Windows line ends."""
