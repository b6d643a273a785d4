"""Invalid JSON, and JSON whose content is not rows."""

import json

from tests.support.data_files.case import GOOD, one_file, second_line

OBJECT = GOOD.strip()

JSON_FILES = (
    one_file("empty", "train.jsonl", "", "pvc://data/train.jsonl has no rows (0 bytes): it needs at least one"),
    one_file("blank lines", "train.jsonl", "\n \n\r\n", "pvc://data/train.jsonl has no rows (5 bytes)"),
    one_file("only a byte order mark", "train.jsonl", b"\xef\xbb\xbf", "pvc://data/train.jsonl has no rows (3 bytes)"),
    second_line(
        "cut off",
        GOOD[:40],
        " column 41: not valid JSON (Expecting ':' delimiter); the file seems to be cut off here: a .jsonl file has o",
    ),
    second_line(
        "cut off in a text", GOOD[:27], " column 24: not valid JSON (Unterminated string starting at); the file"
    ),
    second_line("bare words", "hello\n", " column 1: not valid JSON (Expecting value): a .jsonl file has one whole"),
    second_line("single quotes", "{'text': 'a'}\n", " column 2: not valid JSON (Expecting property name enclosed in"),
    second_line(
        "two objects in a line", OBJECT + OBJECT + "\n", f" column {len(OBJECT) + 1}: not valid JSON (Extra data)"
    ),
    second_line("list", "[1]\n", " is a list: must be a JSON object, {…}"),
    second_line("number", "3\n", " is a number: must be a JSON object, {…}"),
    second_line("null", "null\n", " is null: must be a JSON object, {…}"),
    second_line("key twice", '{"text": "a", "text": "b"}\n', ": field 'text' appears twice: keep one"),
    second_line("NaN", '{"messages": NaN}\n', ": NaN is not a JSON value: only finite numbers are allowed"),
    second_line("infinity", '{"messages": -Infinity}\n', ": -Infinity is not a JSON value: only finite numbers"),
    second_line("deep", '{"messages": ' + "[" * 100_000 + "\n", ": not valid JSON (maximum recursion depth exceeded"),
    second_line(
        "long number", '{"messages": ' + "1" * 5000 + "}\n", ": not valid JSON (Exceeds the limit (4300 digits)"
    ),
    second_line(
        "Latin-1",
        b'{"messages": "caf\xe9"}\n',
        f": byte 0xe9 at byte {len(GOOD) + 17} of the file is not UTF-8: save it as UTF-8",
    ),
    one_file(
        "UTF-16",
        "train.jsonl",
        GOOD.encode("utf-16"),
        "pvc://data/train.jsonl line 1: byte 0xff at byte 0 of the file is not UTF-8 (it seems to be UTF-16)",
    ),
    one_file(
        "UTF-16 without its mark",
        "train.jsonl",
        GOOD.encode("utf-16-le"),
        "pvc://data/train.jsonl line 1 column 2: not valid JSON (Expecting property name enclosed in double quotes)",
    ),
    one_file(
        "binary",
        "train.jsonl",
        bytes(range(256)) * 4,
        "pvc://data/train.jsonl line 1 column 1: not valid JSON (Expecting value)",
    ),
    second_line(
        "huge line", '{"messages": "' + "x" * 2**24 + '"}\n', " is longer than 16 MiB: split the row, or check"
    ),
    one_file(
        "list in lines",
        "train.jsonl",
        f"[\n{OBJECT}\n]\n",
        "pvc://data/train.jsonl line 1 column 3: not valid JSON (Expecting value): a .jsonl file has one whole JSON",
    ),
    one_file(
        "object instead of a list",
        "train.json",
        json.dumps({"rows": [json.loads(GOOD)]}, indent=1),
        "pvc://data/train.json is neither a list of objects, [{…}, …], nor does it have one object per line (pvc://data/"
        "train.json line 1 column 3: not valid JSON",
    ),
    one_file(
        "object in one line",
        "train.json",
        json.dumps({"rows": [json.loads(GOOD)]}),
        "pvc://data/train.json line 1 fits no format; it has the columns 'rows'. Formats and the "
        "columns that they need are chat:",
    ),
    one_file("empty list", "train.json", " [ ] ", "pvc://data/train.json has no rows (5 bytes)"),
    one_file("empty .json", "train.json", "", "pvc://data/train.json has no rows (0 bytes)"),
    one_file(
        "list that is cut off",
        "train.json",
        f"[{OBJECT},\n{OBJECT[:30]}",
        "pvc://data/train.json line 2 (item 2), in line 2: not valid JSON (Expecting property name enclosed in double "
        "quotes); the file seems to be cut off here: a .json file is one list of objects",
    ),
    one_file(
        "list without an end",
        "train.json",
        f"[{OBJECT}\n",
        "pvc://data/train.json line 2: found the end of the file (it seems to be cut off) after item 1, expected ','",
    ),
    one_file(
        "list with a comma too many",
        "train.json",
        f"[{OBJECT},]",
        "pvc://data/train.json line 1: found ']' as item 2, expected an object, {…}",
    ),
    one_file(
        "list of texts",
        "train.json",
        '\n["a"]',
        """pvc://data/train.json line 2: found '"a"]' as item 1, expected an""",
    ),
    one_file(
        "two lists",
        "train.json",
        f"[{OBJECT}]\n[]",
        "pvc://data/train.json line 2: found '[]' after the end of the list, expected nothing",
    ),
    one_file(
        "key twice in a list",
        "train.json",
        f'[{OBJECT},\n{{"messages": 1, "messages": 2}}]',
        "pvc://data/train.json line 2 (item 2): field 'messages' appears twice: keep one",
    ),
    one_file(
        "deep in a list",
        "train.json",
        f'[{OBJECT},\n{{"messages": {"[" * 100_000}',
        "pvc://data/train.json line 2 (item 2): not valid JSON (maximum recursion depth exceeded",
    ),
    one_file(
        "Latin-1 in a list",
        "train.json",
        f"[{OBJECT},\n".encode() + b'{"messages": "caf\xe9"}]',
        f"pvc://data/train.json line 2: byte 0xe9 at byte {len(OBJECT) + 20} of the file is not UTF-8",
    ),
    one_file(
        "cut in the middle of a character",
        "train.json",
        f'[{OBJECT},\n{{"messages": "'.encode() + "é".encode()[:1],
        f"pvc://data/train.json line 2: byte 0xc3 at byte {len(OBJECT) + 17} of the file is not UTF-8",
    ),
    one_file(
        "neither JSON nor lines",
        "train.json",
        "hello",
        "pvc://data/train.json is neither a list of objects, [{…}, …], nor does it have one object per line",
    ),
    one_file(
        "no format",
        "train.jsonl",
        '{"question": "a", "answer": "b"}\n',
        "pvc://data/train.jsonl line 1 fits no format; it has the columns 'question', 'answer'. Formats and the "
        "columns that they need are chat: messages; ",
    ),
    one_file(
        "two formats",
        "train.jsonl",
        '{"prompt": "a", "completion": "b", "text": "c"}\n',
        "pvc://data/train.jsonl line 1 fits more than one format, prompt-completion and text; it has the columns 'pro",
    ),
    one_file(
        "column that is missing later",
        "train.jsonl",
        '{"text": "a"}\n{"txt": "b"}\n',
        "pvc://data/train.jsonl line 2 has no column 'text', which format text needs; it has 'txt'",
    ),
    one_file(
        "wrong column name",
        "train.jsonl",
        GOOD,
        "pvc://data/train.jsonl line 1 fits no format; it has the columns 'messages'. Formats and the "
        "columns that they need",
        columns={"messages": "turns"},
    ),
    one_file(
        "another format",
        "train.jsonl",
        GOOD,
        "pvc://data/train.jsonl line 1 has no column 'text', which format text needs; it has 'messages': name it in",
        format="text",
    ),
    one_file(
        "tools column that is not there",
        "train.jsonl",
        GOOD,
        "line 1 has no column 'functions', which format chat needs; it has 'messages'",
        columns={"tools": "functions"},
    ),
    one_file(
        "all too long",
        "train.jsonl",
        GOOD.replace("pods?", "pods? " * 99),
        "pvc://data/train.jsonl: all 1 rows are longer than spec.training.maxSequenceLength (64), the longest has",
    ),
)
