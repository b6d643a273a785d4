"""Data sets as people have them: what is read, what is refused, and how the refusal reads."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.failures import StepFailure
from qlora_trainer.prepare import prepare
from tests.trainer.conftest import MakeContext
from tests.trainer.tiny import Recorded, chat_row, write_rows

GOOD = json.dumps(chat_row("Which pods?", "kubectl get pods")) + "\n"
LINE = "pvc://data/train.jsonl line 2"


def chat(*roles: str, content: Any = "some text") -> str:
    """A line of format chat with these roles."""
    return json.dumps({"messages": [{"role": role, "content": content} for role in roles]}) + "\n"


BAD_JSONL: list[tuple[str, bytes | str, str]] = [
    ("empty", "", "pvc://data/train.jsonl has no rows (0 bytes)"),
    ("blank", "\n \n", "pvc://data/train.jsonl has no rows (3 bytes)"),
    ("cut", GOOD + GOOD[:40], f"{LINE} column 41: not valid JSON (Expecting ':' delimiter); the file seems to be cut"),
    (
        "cut in a text",
        GOOD + GOOD[:27],
        f"{LINE} column 24: not valid JSON (Unterminated string starting at); the file",
    ),
    ("bare words", GOOD + "hello\n", f"{LINE} column 1: not valid JSON (Expecting value): a .jsonl file has one whole"),
    ("array", GOOD + "[1]\n", f"{LINE} is a list: must be a JSON object"),
    ("whole array", "[\n" + GOOD, "pvc://data/train.jsonl line 1 column 1: not valid JSON"),
    ("number", GOOD + "3\n", f"{LINE} is a number: must be a JSON object"),
    ("null", GOOD + "null\n", f"{LINE} is null: must be a JSON object"),
    ("twice", GOOD + '{"text": "a", "text": "b"}\n', f"{LINE}: field 'text' appears twice"),
    ("NaN", GOOD + '{"messages": NaN}\n', f"{LINE}: NaN is not a JSON value: only finite numbers are allowed"),
    ("infinity", GOOD + '{"messages": -Infinity}\n', f"{LINE}: -Infinity is not a JSON value"),
    ("deep", GOOD + '{"messages": ' + "[" * 100_000 + "\n", f"{LINE}: not valid JSON (maximum recursion depth"),
    ("long number", GOOD + '{"messages": ' + "1" * 5000 + "}\n", f"{LINE}: not valid JSON (Exceeds the limit"),
    (
        "Latin-1",
        GOOD.encode() + b'{"messages": "caf\xe9"}\n',
        f"{LINE}: byte 0xe9 at byte {len(GOOD) + 17} of the file",
    ),
    ("UTF-16", GOOD.encode("utf-16"), "pvc://data/train.jsonl line 1: byte 0xff at byte 0 of the file is not UTF-8"),
    ("huge line", GOOD + '{"messages": "' + "x" * 2**24 + '"}\n', f"{LINE} is longer than 16 MiB"),
    ("no column", GOOD + '{"chat": []}\n', f"{LINE} has no column 'messages', which format chat needs; it has 'chat'"),
    ("text messages", GOOD + '{"messages": "hi"}\n', f"{LINE}: 'messages' is text: must be a list"),
    ("null messages", GOOD + '{"messages": null}\n', f"{LINE}: 'messages' is null: must be a list"),
    ("no messages", GOOD + '{"messages": []}\n', f"{LINE}: 'messages' is empty"),
    ("list of text", GOOD + '{"messages": ["hi"]}\n', f"{LINE}: 'messages[0]' is text: must be an object with role"),
    (
        "other keys",
        GOOD + '{"messages": [{"from": "human", "value": "hi"}]}\n',
        f"{LINE}: 'messages[0]' has no role and no content; it has 'from', 'value'",
    ),
    (
        "unknown role",
        GOOD + chat("human", "assistant"),
        f"{LINE}: 'messages[0].role' is 'human': must be one of system",
    ),
    ("number as role", GOOD + '{"messages": [{"role": 1, "content": "a"}]}\n', "'messages[0].role' is a number"),
    (
        "same role twice",
        GOOD + chat("user", "user", "assistant"),
        f"{LINE}: 'messages[1].role' is 'user' after 'user' where 'assistant' is expected",
    ),
    ("answer first", GOOD + chat("assistant", "user"), "'messages[0].role' is 'assistant' where 'user' is expected"),
    ("late system", GOOD + chat("user", "system"), "'messages[1].role' is 'system' after 'user' where 'assistant'"),
    ("no answer", GOOD + chat("system", "user"), f"{LINE}: 'messages' has no assistant message"),
    ("only system", GOOD + chat("system"), f"{LINE}: 'messages' has no assistant message"),
    ("number", GOOD + chat("user", "assistant", content=3), f"{LINE}: 'messages[0].content' is a number: must be text"),
    ("parts", GOOD + chat("user", "assistant", content=[{}]), f"{LINE}: 'messages[0].content' is a list: must be text"),
    ("empty", GOOD + chat("user", "assistant", content=" "), f"{LINE}: 'messages[0].content' is empty"),
    ("surrogate", GOOD + chat("user", "assistant", content="\ud800"), "'messages[0].content' has half of a surrogate"),
    (
        "tools",
        GOOD + '{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}\n',
        f"{LINE}: 'messages[0].tool_calls' is set: tool calls are not supported",
    ),
    (
        "no format",
        '{"question": "a", "answer": "b"}\n',
        "line 1 fits no format; it has the columns 'question', 'answer'. Formats and what they need are chat:",
    ),
    (
        "two formats",
        '{"prompt": "a", "completion": "b", "text": "c"}\n',
        "fits more than one format, prompt-completion and text;",
    ),
    ("missing later", '{"text": "a"}\n{"txt": "b"}\n', f"{LINE} has no column 'text', which format text needs; it has"),
    ("empty text", '{"text": "a"}\n{"text": ""}\n', f"{LINE}: 'text' is empty: must be text"),
    ("number text", '{"text": "a"}\n{"text": 1.5}\n', f"{LINE}: 'text' is a number: must be text"),
    ("true", '{"prompt": "a", "completion": true}\n', "line 1: 'completion' is true: must be text"),
    ("object", '{"instruction": "a", "input": {}, "output": "b"}\n', "line 1: 'input' is an object: must be text"),
    (
        "all too long",
        GOOD.replace("pods?", "pods? " * 99),
        "all 1 rows are longer than spec.training.maxSequenceLength",
    ),
]


def refusal(make_context: MakeContext, records: Recorded, spec: dict[str, Any] | None = None) -> str:
    """The message with which prepare refuses the data set; nothing of it is left in the workspace."""
    context = make_context(spec)
    with pytest.raises(StepFailure) as failure:
        prepare(context, records)
    assert failure.value.exit_code is ExitCode.BAD_DATASET, failure.value.message
    assert not [*context.workspace.root.rglob("*")]
    return failure.value.message


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BAD_JSONL], ids=[case[0] for case in BAD_JSONL])
def test_bad_jsonl_is_refused_with_its_place(
    make_context: MakeContext, records: Recorded, tmp_path: Path, content: bytes | str, message: str
) -> None:
    (tmp_path / "data").mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "data" / "train.jsonl").write_bytes(data)
    found = refusal(make_context, records)
    assert message in found
    assert len(found) < 600


BAD_CSV = [
    ("empty", "", "train.csv has no rows (0 bytes)"),
    ("header only", "prompt,completion\n", "train.csv has no rows (18 bytes)"),
    ("twice", "text,text\na,b\n", "line 1 must be the header: unique names, none empty; found ['text', 'text']"),
    ("nameless", "text,\na,b\n", "line 1 must be the header"),
    (
        "more cells",
        "prompt,completion\na,b\nc,d,e\n",
        "row 2 (ends in line 3) has 3 cells, but the header has 2 (prompt,",
    ),
    ("fewer cells", "prompt,completion\na,b\nc\n", "row 2 (ends in line 3) has 1 cells, but the header has 2"),
    ("open quote", 'prompt,completion\na,b\nc,"d\n', "line 3 (after row 1): not valid CSV (unexpected end of data)"),
    ("stray quote", 'prompt,completion\na,"b"c\n', "line 2 (after row 0): not valid CSV"),
    (
        "semicolons",
        "prompt;completion\na;b\n",
        "row 1 (ends in line 2) fits no format; it has the columns 'prompt;compl",
    ),
    ("empty cell", "prompt,completion\na,b\nc,\n", "row 2 (ends in line 3): 'completion' is empty"),
    ("chat", "messages\n[]\n", "row 1 (ends in line 2): 'messages' is text: must be a list"),
]


@pytest.mark.parametrize(("content", "message"), [case[1:] for case in BAD_CSV], ids=[case[0] for case in BAD_CSV])
def test_bad_csv_is_refused_with_its_place(
    make_context: MakeContext, records: Recorded, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text(content)
    assert message in refusal(make_context, records, {"dataset": {"source": "pvc://data/train.csv"}})


def test_bad_parquet_is_refused_with_its_place(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    path = tmp_path / "data" / "train.parquet"
    path.parent.mkdir()
    spec = {"dataset": {"source": "pvc://data/train.parquet"}}

    path.write_bytes(b"")
    assert "train.parquet cannot be read as Parquet (at its start or end" in refusal(make_context, records, spec)

    pq.write_table(pa.table({"text": ["some text"] * 300}), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as Parquet" in refusal(make_context, records, spec)

    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "train.parquet has no rows" in refusal(make_context, records, spec)

    pq.write_table(pa.table({"text": ["a", "b", None]}), path)
    assert "train.parquet row 3: 'text' is null: must be text" in refusal(make_context, records, spec)

    pq.write_table(pa.table({"text": ["a"], "time": pa.array([1], pa.timestamp("ns"))}), path)
    assert "cannot be read as Parquet (at its start or end: Nanosecond" in refusal(make_context, records, spec)

    pq.write_table(pa.table({"text": [1.0, float("nan")]}), path)
    assert "train.parquet row 1: 'text' is a number: must be text" in refusal(make_context, records, spec)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"source": "pvc://data/other.jsonl"}, "pvc://data/other.jsonl does not exist; its folder has train.jsonl"),
        ({"source": "pvc://data/no/other.jsonl"}, "pvc://data/no/other.jsonl does not exist; its folder has none"),
        ({"source": "pvc://data"}, "pvc://data is a folder: name one of its data files; it has train.jsonl"),
        ({"source": "pvc://data/train.txt"}, "train.txt does not exist"),
        ({"format": "text"}, "line 1 has no column 'text', which format text needs; it has 'messages': name it in"),
        (
            {"columns": {"messages": "turns"}},
            "fits no format; it has the columns 'messages'. Formats and what they need",
        ),
        ({"sha256": "0" * 64}, "but spec.dataset.sha256 is 0000"),
        ({"eval": {"fraction": 0.5}}, "has 1 usable row: to hold out a fraction"),
        ({"eval": {"source": "pvc://data/eval.jsonl"}}, "pvc://data/eval.jsonl does not exist"),
    ],
)
def test_a_data_set_that_is_not_what_the_job_says_is_refused(
    make_context: MakeContext, records: Recorded, tmp_path: Path, dataset: dict[str, Any], message: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(GOOD)
    assert message in refusal(make_context, records, {"dataset": dataset})


def test_a_file_with_another_ending_is_refused(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(GOOD)
    found = refusal(make_context, records, {"dataset": {"source": "pvc://data/train.json"}})
    assert "train.json does not end in .jsonl, .csv, .parquet" in found


def test_an_evaluation_file_is_checked_like_the_training_file(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row("Which?", "This.")])
    write_rows(tmp_path / "data" / "eval.jsonl", [chat_row("Which?", "This."), {"messages": 1}])
    found = refusal(make_context, records, {"dataset": {"eval": {"source": "pvc://data/eval.jsonl"}}})
    assert "pvc://data/eval.jsonl line 2: 'messages' is a number" in found


def test_a_link_out_of_the_volume_is_refused(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text(GOOD)
    (tmp_path / "data" / "train.jsonl").symlink_to("../secret")
    with pytest.raises(StepFailure, match="is a link that leads out of its folder") as failure:
        prepare(make_context(), records)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTEFACT


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pvc://elsewhere/train.jsonl", "volume claim 'elsewhere' is not mounted"),
        ("configMap://rows/train.jsonl", "ConfigMap 'rows' with key 'train.jsonl' does not exist"),
    ],
)
def test_a_missing_volume_or_config_map_may_still_come(
    make_context: MakeContext, records: Recorded, source: str, message: str
) -> None:
    with pytest.raises(StepFailure, match=message) as failure:
        prepare(make_context({"dataset": {"source": source}}), records)
    assert failure.value.exit_code is ExitCode.UNREACHABLE


PAIRS = [{"prompt": f'Question "{n}",\nplease', "completion": f"ünswer {n}"} for n in range(3)]


def test_the_three_kinds_of_file_give_the_same_tokens(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    """Also with a byte order mark, blank lines, Windows line ends and no line end after the last row."""
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps(row, ensure_ascii=False) for row in PAIRS]
    (data / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (data / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b"\r\n")
    quoted = ['"{}","{}"'.format(*(row[key].replace('"', '""') for key in ("prompt", "completion"))) for row in PAIRS]
    (data / "c.csv").write_bytes(b"\xef\xbb\xbf" + "\n".join(["prompt,completion", *quoted]).encode())
    pq.write_table(pa.Table.from_pylist(PAIRS), data / "d.parquet")
    written = set()
    for name in ("a.jsonl", "b.jsonl", "c.csv", "d.parquet"):
        context = make_context({"dataset": {"source": f"pvc://data/{name}"}})
        record = prepare(context, records)
        assert (record.dataset.format, record.dataset.rows) == ("prompt-completion", 3)
        written.add((context.workspace.root / record.data_path / "train.safetensors").read_bytes())
    assert len(written) == 1


def test_rows_of_a_config_map_are_read(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    """A mounted ConfigMap is made of links, as the kubelet makes them."""
    mounted = tmp_path / "config-maps" / "rows"
    write_rows(mounted / "..2026" / "train.jsonl", [chat_row("Which?", "This.")])
    (mounted / "..data").symlink_to("..2026")
    (mounted / "train.jsonl").symlink_to("..data/train.jsonl")
    record = prepare(make_context({"dataset": {"source": "configMap://rows/train.jsonl"}}), records)
    assert record.dataset.used_rows == 1
