"""The pairs of a row of format preference, and their compared answers."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import Columns
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.formats import Reading, RowReader, detect_format
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.statistics import DataStatistics
from qlora_trainer.data.tokenize.chunk_maker import ChunkMaker, Recipe
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.training import adapter_bytes, history, run
from tests.trainer.conftest import MakeContext

ASKED = {"role": "user", "content": "List the pods"}
AGAIN = {"role": "user", "content": "And the nodes?"}
SYSTEM = {"role": "system", "content": "Be short."}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


GOOD, BAD = answer("kubectl get pods"), answer("no idea")


def pair_of(model: Path, values: dict[str, Any], columns: Columns | None = None) -> list[tuple[str, str]]:
    """Return chosen and rejected texts as the model sees them, with their targets."""
    row = Row("pvc://data/train.jsonl line 1", values, 1)
    format_, names = detect_format(row, columns, pairs=True)
    recipe = Recipe(
        tokenizer=model,
        vocabulary=512,
        format=format_,
        columns=names,
        train_on="completion",
        longest_allowed=512,
    )
    chunk = ChunkMaker(recipe).make([row])
    assert format_ == "preference"
    assert chunk.chosen_lengths is not None
    tokenizer, end = AutoTokenizer.from_pretrained(model), int(chunk.chosen_lengths[0])
    return [
        (tokenizer.decode(chunk.input_ids[part]), tokenizer.decode(chunk.input_ids[part][chunk.is_target[part] == 1]))
        for part in (slice(end), slice(end, None))
    ]


def chatml(*messages: dict[str, str]) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, {}),
        ({"prompt": "List the pods", "chosen": [GOOD], "rejected": [BAD]}, {}),
        # As UltraFeedback, whose conversations have the prompt once more.
        ({"prompt": "List the pods", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED]}, {}),
        ({"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, {}),
        (
            {"q": "List the pods", "good": "kubectl get pods", "bad": "no idea"},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {
                "chosen": [{"from": "human", "value": "List the pods"}, {"from": "gpt", "value": "kubectl get pods"}],
                "rejected": [{"from": "human", "value": "List the pods"}, {"from": "gpt", "value": "no idea"}],
            },
            {},
        ),
        ({"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}, {}),
        # Columns of ours, and those that the job names, come first.
        ({"prompt": "List the pods", "chosen": [GOOD], "rejected": [BAD], "preferred_output": [BAD]}, {}),
        (
            {"q": [ASKED], "good": [GOOD], "bad": [BAD], "preferred_output": [BAD], "non_preferred_output": [GOOD]},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
        (
            {"q": {"messages": [ASKED], "tools": []}, "good": [GOOD], "bad": [BAD]},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
        ),
    ],
)
def test_a_pair_is_the_prompt_with_each_answer_however_it_is_written(
    row: dict[str, Any], columns: dict[str, str], tiny_llama: Path
) -> None:
    assert pair_of(tiny_llama, row, Columns(**columns)) == [
        (chatml(ASKED, GOOD), "kubectl get pods<|im_end|>"),
        (chatml(ASKED, BAD), "no idea<|im_end|>"),
    ]


def test_answers_that_both_conversations_have_are_part_of_the_prompt(tiny_llama: Path) -> None:
    talk = [SYSTEM, ASKED, GOOD, AGAIN]
    row = {"chosen": [*talk, answer("kubectl get nodes")], "rejected": [*talk, BAD]}
    assert pair_of(tiny_llama, row) == [
        (chatml(*talk, answer("kubectl get nodes")), "kubectl get nodes<|im_end|>"),
        (chatml(*talk, BAD), "no idea<|im_end|>"),
    ]


def test_openais_rows_train_the_adapter_of_the_same_pairs(make_context: MakeContext, tmp_path: Path) -> None:
    asked = [[SYSTEM, ASKED, GOOD, AGAIN | {"content": f"And {number}?"}] for number in range(4)]
    pairs = [{"prompt": turns, "chosen": [answer("Yes.")], "rejected": [BAD]} for turns in asked]
    openais: list[dict[str, Any]] = [
        {
            "input": {"messages": turns, "tools": [], "parallel_tool_calls": True},
            "preferred_output": [answer("Yes.")],
            "non_preferred_output": [BAD],
        }
        for turns in asked
    ]
    training = {"objective": "dpo", "maxSteps": 2, "maxSequenceLength": 256, "learningRate": 0.01}

    def trained(rows: list[dict[str, Any]], format_: str) -> tuple[object, object]:
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        context = make_context({"dataset": {"format": format_}, "training": training})
        assert prepare(context, Recorded()).dataset.format == "preference"
        run(context)
        result = adapter_bytes(context), history(context)
        shutil.rmtree(context.workspace.root)
        return result

    expected = trained(pairs, "auto")
    assert trained(openais, "auto") == expected
    assert trained(openais, "preference") == expected


def test_pairs_stay_whole_and_unusable_rows_are_counted(make_context: MakeContext, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "chosen": "yes " * 3, "rejected": "no " * (1 + number)} for number in range(9)]
    rows += [
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": " ".join(map(str, range(60))), "rejected": "b"},
    ]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    context = make_context({"training": {"objective": "dpo", "maxSequenceLength": 96}})

    record = prepare(context, Recorded())

    folder = context.workspace.root / record.data_path
    data = PreparedDataset.open(folder, "train")
    assert (record.dataset.format, record.dataset.rows, record.dataset.used_rows) == ("preference", 11, 9)
    assert record.dataset.too_long_rows == 1
    assert [dropped.reason for dropped in DataStatistics.read(folder).sources[0].dropped] == [
        "longer than 96 tokens (spec.training.maxSequenceLength)",
        "chosen and rejected are the same",
    ]
    assert 1 < len(data) < 9
    lengths = [data[index].row_lengths for index in range(len(data))]
    assert all(len(rows) % 2 == 0 and sum(rows) <= 96 for rows in lengths)
    numbers = [data[index].row_numbers or () for index in range(len(data))]
    assert [number for sequence in numbers for number in sequence] == list(range(sum(map(len, lengths))))
    assert [len(sequence) for sequence in numbers] == [len(rows) for rows in lengths]


def test_rows_that_are_pairs_too_are_prepared_again_for_another_objective(
    make_context: MakeContext, tmp_path: Path
) -> None:
    both = {"messages": [ASKED, GOOD], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    write_rows(tmp_path / "data" / "train.jsonl", [both] * 3)
    assert prepare(make_context(), Recorded()).dataset.format == "chat"
    assert prepare(make_context({"training": {"objective": "dpo"}}), Recorded()).dataset.format == "preference"


def test_the_columns_of_a_mixs_source_are_named_where_the_job_has_them() -> None:
    with pytest.raises(StepFailure, match=r"name it in spec\.dataset\.mix\[1\]\.columns\.prompt, or"):
        RowReader("preference", None, "spec.dataset.mix[1]").read(Row("line 1", {"chosen": "a", "rejected": "b"}, 1))


def test_rows_with_one_rated_answer_are_not_silently_taken_for_good_ones(
    make_context: MakeContext, tmp_path: Path
) -> None:
    rows = [{"prompt": f"q{number}", "completion": "a", "label": number % 2 == 0} for number in range(4)]
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    _of_few_steps, remark = prepare(make_context(), Recorded()).remarks
    assert remark.startswith(
        "pvc://data/train.jsonl: the column 'label' is not used: if it marks answers as good or bad"
    )
    # Answers that are missing or already compared are another matter.
    assert Reading("text", ("text",), ("label",)).remark == ""
    assert Reading("preference", ("chosen", "rejected"), ("label",)).remark == ""


@pytest.mark.parametrize(
    ("row", "objective", "message"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "supervised",
            "is of format preference ('chosen' and 'rejected'), whose answers only an objective that compares them",
        ),
        (
            chat_row("q", "a"),
            "dpo",
            "has no 'chosen' and 'rejected', which spec.training.objective compares; it has the columns 'messages'",
        ),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "supervised",
            " line 1 is of format preference ('preferred_output' and 'non_preferred_output'), whose answers only an",
        ),
        (
            {"input": {"messages": [ASKED]}, "preferred_output": [GOOD], "non_preferred_output": [GOOD]},
            "dpo",
            ": in all 1 rows 'preferred_output' and 'non_preferred_output' are the same, so that",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "dpo",
            ": in all 1 rows 'chosen' and 'rejected' are the same, so that there is nothing to prefer",
        ),
    ],
)
def test_data_that_the_objective_cannot_use_are_rejected_with_a_remedy(
    row: dict[str, Any], objective: str, message: str, make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [row])
    with pytest.raises(StepFailure) as raised:
        prepare(make_context({"training": {"objective": objective}}), Recorded())
    assert raised.value.exit_code is ExitCode.BAD_DATASET
    assert raised.value.message.startswith("pvc://data/train.jsonl")
    assert message in raised.value.message


def test_data_with_answers_in_another_format_too_keep_their_format(make_context: MakeContext, tmp_path: Path) -> None:
    """UltraFeedback's rows also have a conversation, for jobs that compare no pairs."""
    row = chat_row("q", "a") | {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    write_rows(tmp_path / "data" / "train.jsonl", [row])
    assert prepare(make_context(), Recorded()).dataset.format == "chat"
