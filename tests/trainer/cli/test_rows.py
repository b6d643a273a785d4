"""Output of `qlora data` and `qlora plan --data` about a job's rows."""

import io
import json
import re
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobSpec
from qlora_cli.__main__ import main
from qlora_cli.local.rows import RowAccess, show_rows
from qlora_trainer.core.context import Mounts
from qlora_trainer.data.examples.wrong_rows import WrongRows
from tests.support.models.tiny import chat_row, write_rows
from tests.support.resolved import TRAINING

ROWS = [chat_row("Which pods?", "kubectl get pods"), chat_row("Which nodes?", "kubectl get nodes " * 20)]


def spec_of(**dataset: Any) -> dict[str, Any]:
    """A job over the tiny model."""
    return {
        "model": {"source": "pvc://models/model"},
        "dataset": {"source": "pvc://data/train.jsonl", **dataset},
        "training": TRAINING | {"epochs": 1, "maxSequenceLength": 64},
    }


@pytest.fixture
def qlora(tmp_path: Path, tiny_llama: Path) -> Any:
    """Runs a command over rows, in this process and without a terminal."""

    def run(command: str, rows: list[dict[str, Any]], *options: str, **dataset: Any) -> Result:
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        document = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": "tiny"}}
        spec = spec_of(**dataset)
        if "columns" in dataset:
            spec["gate"] = {"score": {"check": "regex"}}
        if "chosen" in rows[0]:
            spec["training"]["objective"] = "dpo"
        (tmp_path / "job.yaml").write_text(json.dumps(document | {"spec": spec}))
        volumes = ("--volume", f"models={tiny_llama.parent}", "--volume", f"data={tmp_path / 'data'}")
        return CliRunner().invoke(main, [command, str(tmp_path / "job.yaml"), *volumes, *options])

    return run


def test_a_row_is_shown_as_the_model_sees_it_with_its_targets(qlora: Any) -> None:
    done = qlora("data", ROWS, "--rows", "1")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[:3] == [
        "pvc://data/train.jsonl: format chat, columns messages",
        "Tokens that are trained on are between [[ and ]].",
        "",
    ]
    assert lines[3].startswith("pvc://data/train.jsonl line 1: ")
    assert lines[4:] == [
        "<|im_start|>user",
        "Which pods?<|im_end|>",
        "<|im_start|>assistant",
        "[[kubectl get pods<|im_end|>]]",
        "",
        "Only the first row of 2 was read: --rows 0 reads all.",
    ]


def test_a_row_that_is_left_out_is_marked(qlora: Any) -> None:
    output = qlora("data", ROWS).output
    assert output.count("Left out") == 1
    shown = output.partition("line 2: ")[2]
    assert " tokens, 0 trained on\nLeft out: longer than 64 tokens (spec.training.maxSequenceLength)\n" in shown
    assert "[[" not in shown


def test_template_and_system_prompt_of_the_job_are_shown(qlora: Any) -> None:
    output = qlora("data", ROWS[:1], chatTemplate="zephyr", systemPrompt={"text": "Be short."}).output
    assert "<|system|>\nBe short.<|im_end|>\n<|user|>\nWhich pods?<|im_end|>\n" in output
    assert "<|assistant|>\n[[kubectl get pods<|im_end|>]]\n" in output


def test_the_tokens_around_a_plain_text_are_shown(qlora: Any) -> None:
    """The first token has nothing before it that could predict it."""
    output = qlora("data", [{"text": "日本 🎉 ünï"}]).output
    shown = output.splitlines()[-1]
    assert shown.replace("[[", "").replace("]]", "") == "日本 🎉 ünï<|im_end|>"
    assert shown.endswith("ünï<|im_end|>]]")


def test_the_two_answers_of_a_pair_are_shown_one_after_the_other(qlora: Any) -> None:
    output = qlora("data", [{"prompt": "Which pods?", "chosen": "get pods", "rejected": "get nodes"}]).output
    first, second = output.partition("line 1, chosen: ")[2].split("line 1, rejected: ")
    assert "Which pods?<|im_end|>" in first
    assert "[[get pods<|im_end|>]]" in first
    assert "[[get nodes<|im_end|>]]" in second


def test_a_pair_of_equal_answers_is_left_out(qlora: Any) -> None:
    output = qlora("data", [{"prompt": "Which pods?", "chosen": "get pods", "rejected": "get pods"}]).output
    assert output.count("Left out: chosen and rejected are the same\n") == 2


def test_the_rows_of_the_evaluations_own_source_are_shown_after_the_others(qlora: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "held-out.jsonl", [chat_row("Which jobs?", "kubectl get jobs")])
    done = qlora("data", ROWS[:1], eval={"source": "pvc://data/held-out.jsonl"})
    assert done.exit_code == 0, done.output
    shown = done.output.partition("pvc://data/held-out.jsonl (held out): format chat, columns messages\n")[2]
    assert "[[kubectl get jobs<|im_end|>]]" in shown


def test_columns_that_are_not_used_are_named(qlora: Any) -> None:
    output = qlora("data", [ROWS[0] | {"id": 3}]).output
    assert "\nNot used: id\n" in output


def test_a_wrong_row_ends_the_output_as_it_would_end_the_job(qlora: Any) -> None:
    done = qlora("data", [ROWS[0], {"messages": []}])
    assert done.exit_code == ExitCode.BAD_DATASET
    assert "[[kubectl get pods<|im_end|>]]" in done.output
    assert "Error: pvc://data/train.jsonl line 2: 'messages' is empty" in done.output


def test_all_wrong_rows_are_listed_with_totals_by_kind(qlora: Any) -> None:
    empty: dict[str, Any] = {"messages": []}
    role = {"messages": [{"role": "me", "content": "a"}]}
    done = qlora("data", [ROWS[0], empty, role, ROWS[0], empty], "--rows", "0")
    assert done.exit_code == ExitCode.BAD_DATASET
    assert "line 4: " in done.output
    listed = done.output.partition("Error: 3 of the 5 rows that were read are wrong:\n")[2].splitlines()
    assert [line.partition(": ")[0] for line in listed[:3]] == [f"pvc://data/train.jsonl line {n}" for n in (2, 3, 5)]
    assert "\nWrong rows by kind:\n2: 'messages' is empty: must have" in done.output
    assert "\n1: 'messages[…].role' is 'me': must be one of system, user," in done.output


def test_all_rows_of_a_table_with_other_cells_are_listed(qlora: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.csv").write_text("instruction,output\nWhich?,pods\na,b,c\nWhich?,nodes\na\n")
    done = qlora("data", ROWS, "--rows", "4", source="pvc://data/rows.csv")
    assert done.exit_code == ExitCode.BAD_DATASET
    assert "Error: 2 of the 4 rows that were read are wrong:\npvc://data/rows.csv row 2 " in done.output
    assert "row 4 (ends in line 5) has 1 cells, but the header has 2" in done.output


def test_rows_that_were_not_read_are_counted(qlora: Any) -> None:
    done = qlora("data", [*ROWS[:1] * 4, {"messages": []}], "--rows", "2")
    assert done.exit_code == 0, done.output
    assert done.output.endswith("\nOnly the first 2 rows of 5 were read: --rows 0 reads all.\n")
    assert "Only" not in qlora("data", ROWS, "--rows", "2").output


def test_a_plan_names_further_wrong_rows_after_the_first(qlora: Any) -> None:
    done = qlora("plan", [{"messages": []}, ROWS[0], {"messages": 3}], "--data")
    assert done.exit_code == ExitCode.BAD_DATASET
    assert "Error: pvc://data/train.jsonl line 1: 'messages' is empty" in done.output
    assert "; in all, 2 of the 3 rows around it are wrong: pvc://data/train.jsonl line 3: 'messages'" in done.output


def test_a_row_without_a_check_of_its_answer_is_reported_as_by_the_job(qlora: Any, tmp_path: Path) -> None:
    by_rows = {"columns": {"check": "expected"}, "eval": {"fraction": 0.5}}
    done = qlora("data", [ROWS[0] | {"expected": "pods"}, ROWS[1], ROWS[0]], **by_rows)
    assert done.exit_code == ExitCode.BAD_DATASET
    assert "format chat, columns messages, expected\n" in done.output
    # The second row is too long, and left out.
    assert "Error: pvc://data/train.jsonl line 3: 'expected' (spec.dataset.columns.check) is missing" in done.output
    write_rows(tmp_path / "data" / "held-out.jsonl", [ROWS[0] | {"expected": "pods"}])
    apart = by_rows | {"eval": {"source": "pvc://data/held-out.jsonl"}}
    assert qlora("data", ROWS, **apart).exit_code == 0


def test_a_row_cannot_control_the_terminal(qlora: Any) -> None:
    output = qlora("data", [chat_row("a\x1b]0;title\x07b", "c\rd\u202e")]).output
    assert "\x1b" not in output
    assert "a\\x1b]0;title\\x07b" in output
    assert "c\\rd\\u202e" in output


def test_the_first_rows_of_each_source_of_a_mix_are_shown(qlora: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "more.jsonl", [chat_row("Which jobs?", "kubectl get jobs")])
    mix = [{"source": "pvc://data/train.jsonl"}, {"source": "pvc://data/more.jsonl", "format": "chat"}]
    done = qlora("data", ROWS, "--rows", "1", source=None, mix=mix)
    assert done.exit_code == 0, done.output
    assert "[[kubectl get pods<|im_end|>]]" in done.output
    assert "[[kubectl get jobs<|im_end|>]]" in done.output.partition("pvc://data/more.jsonl: format chat")[2]


@pytest.mark.parametrize("no_color", ["", "1"])
def test_on_a_terminal_targets_are_colored_unless_colors_are_off(
    tmp_path: Path, tiny_llama: Path, no_color: str
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    mounts = Mounts(claims={"models": tiny_llama.parent, "data": tmp_path / "data"})
    output = io.StringIO()
    with RowAccess(QLoRAJobSpec.model_validate(spec_of()), mounts).previews(1, WrongRows()) as (preview,):
        show_rows(preview, Console(file=output, force_terminal=True, width=200), {"NO_COLOR": no_color})
    assert ("\x1b[1;32mkubectl get pods<|im_end|>" in output.getvalue()) == (not no_color)
    assert ("[[kubectl get pods<|im_end|>]]" in output.getvalue()) == bool(no_color)


@pytest.mark.parametrize("command", [("data",), ("plan", "--data")])
def test_a_config_map_that_no_option_maps_to_a_folder_is_named(qlora: Any, command: tuple[str, ...]) -> None:
    name, *options = command
    done = qlora(name, ROWS, *options, chatTemplate="configMap://formats/ours.jinja")
    assert done.exit_code == ExitCode.BAD_CONFIGURATION
    assert "spec.dataset.chatTemplate is configMap://formats/ours.jinja: give a folder" in done.output


def test_a_plan_shows_how_long_rows_are_and_how_many_are_left_out(qlora: Any) -> None:
    done = qlora("plan", [*ROWS, *ROWS[:1]], "--data")
    assert done.exit_code == 0, done.output
    assert "pvc://data/train.jsonl: 3 rows" in done.output
    short = next(line for line in done.output.splitlines() if line.startswith("≤ 32 "))
    assert short.split()[2] == "2"
    assert short.endswith("1 of 3 rows (33.3%)")
    assert "spec.training.maxSequenceLength is 64: it leaves out 1 of 3 rows (33.3%)." in done.output


def test_a_plan_with_data_names_steps_tokens_and_time(qlora: Any) -> None:
    done = qlora("plan", [*ROWS] * 40, "--data", "--gpu=l40s", "--gpu-hour-price=1.00 EUR")
    assert done.exit_code == 0, done.output
    [tokens] = re.findall(r"Tokens: ([\d,]+) in an epoch", done.output)
    [(steps, sequences)] = re.findall(r"Steps: (\d+) = 1 epoch × (\d+) sequences", done.output)
    assert int(tokens.replace(",", "")) / 64 <= int(sequences) < 40
    assert int(steps) == ceil(int(sequences) / 16)
    assert f"Remark: the run makes {steps} optimizer step" in done.output
    time = "less than a minute on 1 L40S, less than 1 GPU minute, 0.00 EUR"
    assert f"Forecast: {time}: {tokens} tokens" in done.output


@pytest.mark.parametrize("command", [("data",), ("plan", "--data")])
def test_the_rows_of_a_sweep_are_those_of_its_template(
    tmp_path: Path, tiny_llama: Path, command: tuple[str, ...]
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", [*ROWS, chat_row("Which jobs?", "kubectl get jobs")])
    spec = {"template": {"spec": spec_of(eval={"fraction": 0.5})}, "grid": {"rank": [8, 16]}}
    sweep = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "metadata": {"name": "ranks"}, "spec": spec}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    volumes = ("--volume", f"models={tiny_llama.parent}", "--volume", f"data={tmp_path / 'data'}")
    done = CliRunner().invoke(main, [*command, str(tmp_path / "sweep.yaml"), *volumes])
    assert done.exit_code == 0, done.output
    assert "pvc://data/train.jsonl" in done.output


def test_a_plan_shows_lengths_where_no_row_fits_and_names_rows_without_a_target(qlora: Any) -> None:
    pairs = [{"prompt": "Which?", "chosen": "pods " * 40, "rejected": "nodes"}] * 2
    equal = {"prompt": "Which?", "chosen": "pods", "rejected": "pods"}
    done = qlora("plan", [*pairs, equal], "--data")
    assert done.exit_code == 0, done.output
    assert "pvc://data/train.jsonl: 3 rows" in done.output
    found = "Left out: 1 row: chosen and rejected are the same (the first: pvc://data/train.jsonl line 3)"
    assert found in done.output
    assert "spec.training.maxSequenceLength is 64: it leaves out 2 of 2 rows (100.0%)." in done.output
    assert "\nThe job fails: pvc://data/train.jsonl: all 2 rows are longer than" in done.output


@pytest.mark.parametrize("overlap", ["report", "fail", "drop"])
def test_a_plan_shows_lengths_where_rows_are_held_out_too(qlora: Any, tmp_path: Path, overlap: str) -> None:
    write_rows(tmp_path / "data" / "held-out.jsonl", ROWS[:1])
    own = {"source": "pvc://data/held-out.jsonl", "overlap": overlap}
    done = qlora("plan", [chat_row("Which jobs?", "kubectl get jobs"), *ROWS], "--data", eval=own)
    assert done.exit_code == 0, done.output
    assert "pvc://data/held-out.jsonl: 1 row" in done.output
    first = "the first, pvc://data/train.jsonl line 2, is equal to pvc://data/held-out.jsonl line 1"
    sentence = f"1 row for training is also held out: {first}"
    ends = {
        "report": f"\nOverlap: {sentence}; trained on nevertheless.\n",
        "drop": f"\nOverlap: {sentence}; left out of training.\n",
        "fail": f"\nThe job fails: {sentence}; spec.dataset.eval.overlap is fail: ",
    }
    assert done.output.count(sentence) == 1
    assert ends[overlap] in done.output


@pytest.mark.parametrize(
    ("deduplicate", "rows", "line"),
    [
        (True, [*ROWS[:1] * 3, ROWS[1]], "Duplicates: 2 rows, left out."),
        (False, [*ROWS[:1] * 2, ROWS[1]], "Duplicates: 1 row, kept."),
        (False, ROWS, "Duplicates: none."),
    ],
)
def test_a_plan_counts_duplicates(qlora: Any, deduplicate: bool, rows: list[dict[str, Any]], line: str) -> None:
    done = qlora("plan", rows, "--data", deduplicate=deduplicate)
    assert done.exit_code == 0, done.output
    assert f"\n{line}\n" in done.output
    assert "The job fails" not in done.output


def test_a_plan_shows_each_sources_share_of_an_epoch(qlora: Any, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "data" / "more.jsonl", [chat_row(f"Job {number}?", "kubectl get jobs") for number in range(4)]
    )

    def output(*weights: float | None) -> str:
        named = zip(("train", "more"), weights, strict=True)
        mix = [{"source": f"pvc://data/{name}.jsonl", "weight": weight} for name, weight in named]
        rows = [chat_row(f"Pod {number}?", "kubectl get pods") for number in range(20)]
        done = qlora("plan", rows, "--data", source=None, mix=mix)
        assert done.exit_code == 0, done.output
        return str(done.output)

    weighted = output(1, 3)
    assert "\npvc://data/train.jsonl: 6 of 24 rows of an epoch, each 0.3 times.\n" in weighted
    assert "\npvc://data/more.jsonl: 18 of 24 rows of an epoch, each 4.5 times.\n" in weighted
    assert "\npvc://data/more.jsonl: 4 of 24 rows of an epoch, each once.\n" in output(None, None)
    rejected = output(1, 1000)
    assert "\npvc://data/train.jsonl: 0 of 24 rows of an epoch, each 0 times.\n" in rejected
    assert "\nThe job fails: pvc://data/train.jsonl (spec.dataset.mix[0]) gives none of the 24 rows" in rejected


def test_a_plan_reports_too_few_rows_to_hold_out_some(qlora: Any) -> None:
    done = qlora("plan", [ROWS[0]] * 2, "--data", deduplicate=True, eval={"fraction": 0.5})
    assert done.exit_code == 0, done.output
    assert "Tokens per row" in done.output
    assert "\nThe job fails: pvc://data/train.jsonl has 1 usable row: to hold out a fraction" in done.output
