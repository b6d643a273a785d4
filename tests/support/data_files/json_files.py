"""Invalid JSON, and JSON whose content is not rows."""

import json

from tests.support.data_files.case import GOOD, json_lines, json_list, one_file, second_line

OBJECT = GOOD.strip()

JSON_FILES = (
    json_lines("empty", "", " has no rows (0 bytes): it needs at least one"),
    json_lines("blank lines", "\n \n\r\n", " has no rows (5 bytes)"),
    json_lines("only a byte order mark", b"\xef\xbb\xbf", " has no rows (3 bytes)"),
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
    json_lines(
        "UTF-16", GOOD.encode("utf-16"), " line 1: byte 0xff at byte 0 of the file is not UTF-8 (it seems to be UTF-16)"
    ),
    json_lines(
        "UTF-16 without its mark",
        GOOD.encode("utf-16-le"),
        " line 1 column 2: not valid JSON (Expecting property name enclosed in double quotes)",
    ),
    json_lines("binary", bytes(range(256)) * 4, " line 1 column 1: not valid JSON (Expecting value)"),
    second_line(
        "huge line", '{"messages": "' + "x" * 2**24 + '"}\n', " is longer than 16 MiB: split the row, or check"
    ),
    json_lines(
        "list in lines",
        f"[\n{OBJECT}\n]\n",
        " line 1 column 3: not valid JSON (Expecting value): a .jsonl file has one whole JSON",
    ),
    json_list(
        "object instead of a list",
        json.dumps({"rows": [json.loads(GOOD)]}, indent=1),
        " is neither a list of objects, [{…}, …], nor does it have one object per line (pvc://data/"
        "train.json line 1 column 3: not valid JSON",
    ),
    json_list(
        "object in one line",
        json.dumps({"rows": [json.loads(GOOD)]}),
        " line 1 fits no format; it has the columns 'rows'. Formats and the columns that they need are chat:",
    ),
    json_list("empty list", " [ ] ", " has no rows (5 bytes)"),
    json_list("empty .json", "", " has no rows (0 bytes)"),
    json_list(
        "list that is cut off",
        f"[{OBJECT},\n{OBJECT[:30]}",
        " line 2 (item 2), in line 2: not valid JSON (Expecting property name enclosed in double "
        "quotes); the file seems to be cut off here: a .json file is one list of objects",
    ),
    json_list(
        "list without an end",
        f"[{OBJECT}\n",
        " line 2: found the end of the file (it seems to be cut off) after item 1, expected ','",
    ),
    json_list("list with a comma too many", f"[{OBJECT},]", " line 1: found ']' as item 2, expected an object, {…}"),
    json_list("list of texts", '\n["a"]', """ line 2: found '"a"]' as item 1, expected an"""),
    json_list("two lists", f"[{OBJECT}]\n[]", " line 2: found '[]' after the end of the list, expected nothing"),
    json_list(
        "key twice in a list",
        f'[{OBJECT},\n{{"messages": 1, "messages": 2}}]',
        " line 2 (item 2): field 'messages' appears twice: keep one",
    ),
    json_list(
        "deep in a list",
        f'[{OBJECT},\n{{"messages": {"[" * 100_000}',
        " line 2 (item 2): not valid JSON (maximum recursion depth exceeded",
    ),
    json_list(
        "Latin-1 in a list",
        f"[{OBJECT},\n".encode() + b'{"messages": "caf\xe9"}]',
        f" line 2: byte 0xe9 at byte {len(OBJECT) + 20} of the file is not UTF-8",
    ),
    json_list(
        "cut in the middle of a character",
        f'[{OBJECT},\n{{"messages": "'.encode() + "é".encode()[:1],
        f" line 2: byte 0xc3 at byte {len(OBJECT) + 17} of the file is not UTF-8",
    ),
    json_list(
        "neither JSON nor lines",
        "hello",
        " is neither a list of objects, [{…}, …], nor does it have one object per line",
    ),
    json_lines(
        "no format",
        '{"question": "a", "answer": "b"}\n',
        " line 1 fits no format; it has the columns 'question', 'answer'. Formats and the "
        "columns that they need are chat: messages; ",
    ),
    json_lines(
        "two formats",
        '{"prompt": "a", "completion": "b", "text": "c"}\n',
        " line 1 fits more than one format, prompt-completion and text; it has the columns 'pro",
    ),
    json_lines(
        "column that is missing later",
        '{"text": "a"}\n{"txt": "b"}\n',
        " line 2 has no column 'text', which format text needs; it has 'txt'",
    ),
    json_lines(
        "wrong column name",
        GOOD,
        " line 1 fits no format; it has the columns 'messages'. Formats and the columns that they need",
        columns={"messages": "turns"},
    ),
    json_lines(
        "another format",
        GOOD,
        " line 1 has no column 'text', which format text needs; it has 'messages': name it in",
        format="text",
    ),
    one_file(
        "tools column that is not there",
        "train.jsonl",
        GOOD,
        "line 1 has no column 'functions', which format chat needs; it has 'messages'",
        columns={"tools": "functions"},
    ),
    json_lines(
        "all too long",
        GOOD.replace("pods?", "pods? " * 99),
        ": all 1 rows are longer than spec.training.maxSequenceLength (64), the longest has",
    ),
)
