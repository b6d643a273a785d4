"""Invalid CSV and Parquet, and tables whose rows are not examples."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.data_files.case import BadData, one_file


def parquet(columns: dict[str, Any]) -> bytes:
    """A Parquet file of these columns."""
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


TEXTS = parquet({"text": ["some text"] * 300})

# A footer with a column that cannot be null (field 3 of the schema's element) and a count of nulls in it.
CONTRADICTION = parquet({"messages": [[{"role": "user", "content": "q"}]]}).replace(
    b"\x35\x02\x18\x08messages", b"\x34\x02\x18\x08messages"
)

TALK = [
    {"role": "user", "content": "a", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}]},
    {"role": "tool", "content": "b", "tool_calls": None},
    {"role": "assistant", "content": "c", "tool_calls": [{"name": "f", "arguments": {"x": None, "y": "2"}}]},
]


def table(name: str, content: str | bytes, message: str) -> BadData:
    """A CSV file."""
    return one_file(name, "train.csv", content, f"pvc://data/train.csv {message}")


def columns(name: str, content: bytes, message: str) -> BadData:
    """A Parquet file."""
    return one_file(name, "train.parquet", content, f"pvc://data/train.parquet {message}")


TABLES = (
    table("empty CSV", "", "has no rows (0 bytes)"),
    table("CSV with a header only", "prompt,completion\n", "has no rows (18 bytes)"),
    table(
        "column twice", "text,text\na,b\n", "line 1 must be the header: unique names, none empty; found ['text', 'te"
    ),
    table("nameless column", "text,\na,b\n", "line 1 must be the header"),
    table(
        "more cells",
        "prompt,completion\na,b\nc,d,e\n",
        "row 2 (ends in line 3) has 3 cells, but the header has 2 (prompt, completion): put cells with commas",
    ),
    table("fewer cells", "prompt,completion\na,b\nc\n", "row 2 (ends in line 3) has 1 cells, but the header has 2"),
    table(
        "open quote",
        'prompt,completion\na,b\nc,"d\n',
        "line 3 (after row 1): not valid CSV (unexpected end of data): a cell",
    ),
    table("stray quote", 'prompt,completion\na,"b"c\n', "line 2 (after row 0): not valid CSV"),
    table(
        "semicolons",
        "prompt;completion\na;b\n",
        "row 1 (ends in line 2) fits no format; it has the columns 'prompt;comp",
    ),
    table("empty cell", "prompt,completion\na,b\nc,\n", "row 2 (ends in line 3): 'completion' is empty: must be text"),
    table("chat in CSV", "messages\n[]\n", "row 1 (ends in line 2): 'messages' is text: must be a list"),
    table("CSV in Latin-1", b"text\ncaf\xe9\n", "line 2: byte 0xe9 at byte 8 of the file is not UTF-8"),
    columns("empty Parquet", b"", "cannot be read as Parquet (at its start or end"),
    columns("Parquet that is cut off", TEXTS[:-20], "cannot be read as Parquet (at its start or end"),
    columns("JSON called Parquet", b'{"text": "a"}\n', "cannot be read as Parquet (at its start or end"),
    columns("damaged Parquet", TEXTS[:4] + b"\xff" * 40 + TEXTS[44:], "cannot be read as Parquet"),
    columns("contradiction in a Parquet footer", CONTRADICTION, "cannot be read as Parquet (at its start or end: "),
    columns("Parquet without rows", parquet({"text": pa.array([], pa.string())}), "has no rows"),
    columns("null in Parquet", parquet({"text": ["a", "b", None]}), "row 3: 'text' is null: must be text"),
    columns("numbers in Parquet", parquet({"text": [1.0, float("nan")]}), "row 1: 'text' is a number: must be text"),
    columns("bytes in Parquet", parquet({"text": [b"a"]}), "row 1: 'text' is bytes: must be text"),
    columns(
        "null as a turn", parquet({"messages": [[{"role": "user", "content": None}]]}), "row 1: 'messages[0].content'"
    ),
    columns(
        "arguments in Parquet's columns",
        parquet({"messages": [TALK], "tools": ['[{"name": "f"}]']}),
        "row 1: 'messages[1].tool_calls[0].arguments' has null, which Parquet also writes for a key that "
        "a row does not have",
    ),
)
