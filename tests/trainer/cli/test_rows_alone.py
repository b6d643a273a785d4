"""`qlora data` and `qlora plan --data` of rows without a manifest: a file, a folder or an address."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qlora_api.contract import ExitCode
from qlora_cli.__main__ import main
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.resolved import OPEN
from tests.trainer.conftest import MakeContext

ROW = chat_row("Which pods?", "kubectl get pods")
PAIR = {"prompt": "Which pods?", "chosen": "get pods", "rejected": "get nodes"}


def qlora(*arguments: Any) -> Result:
    """Run a command in this process and without a terminal."""
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("named", ["file", "folder", "address"])
def test_rows_are_shown_without_a_manifest(tmp_path: Path, tiny_llama: Path, named: str) -> None:
    file = write_rows(tmp_path / "train.jsonl", [ROW])
    address = ["pvc://data", "--volume", f"data={tmp_path}"]
    rows: dict[str, list[Any]] = {"file": [file], "folder": [tmp_path], "address": address}
    done = qlora("data", *rows[named], "--model", tiny_llama)
    assert done.exit_code == 0, done.output
    assert "[[kubectl get pods<|im_end|>]]" in done.output
    assert f"{'pvc://data/train.jsonl' if named == 'address' else file} line 1: " in done.output


@pytest.mark.parametrize("name", ["train.json", "train.csv"])
def test_rows_of_other_kinds_are_no_manifest(tmp_path: Path, name: str) -> None:
    of_kind = {"train.json": json.dumps([ROW], indent=1), "train.csv": "instruction,output\nWhich?,pods\n"}
    (tmp_path / name).write_text(of_kind[name])
    done = qlora("data", tmp_path / name)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{tmp_path / name}: format ")


def test_without_a_model_all_rows_are_checked_and_none_is_shown(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [ROW] * 5)
    done = qlora("data", file)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        f"{file}: format chat, columns messages",
        "5 rows read. To see rows as the model sees them, name it with --model, such as hf://ORG/NAME or its folder.",
    ]
    wrong = qlora("data", write_rows(file, [*[ROW] * 4, {"messages": []}]))
    assert wrong.exit_code == ExitCode.BAD_DATASET
    assert f"Error: {file} line 5: 'messages' is empty" in wrong.output


def test_pairs_need_no_objective_to_be_shown(tmp_path: Path, tiny_llama: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [PAIR])
    done = qlora("data", file, "--tokenizer", tiny_llama)
    assert done.exit_code == 0, done.output
    assert "[[get nodes<|im_end|>]]" in done.output.partition("line 1, rejected: ")[2]
    assert "columns chosen, rejected, prompt" in qlora("data", file).output


def test_a_plan_of_rows_needs_a_model_and_shows_lengths(tmp_path: Path, tiny_llama: Path) -> None:
    file = write_rows(tmp_path / "train.jsonl", [ROW, ROW])
    done = qlora("plan", "--data", file, "--model", tiny_llama)
    assert done.exit_code == 0, done.output
    assert f"\n{file}: 2 rows\n" in done.output
    without = qlora("plan", "--data", file)
    assert without.exit_code == ExitCode.BAD_CONFIGURATION
    assert f"{file} has rows, and a plan needs a model: give its address or folder with --model" in without.output


def chosen_in(output: str) -> list[str]:
    """The lines with the automatic settings, with single spaces."""
    _, *shown = output.partition("Automatic settings")[2].partition("\n\n")[0].splitlines()
    return [" ".join(line.split()) for line in shown]


def test_plan_and_submit_show_the_settings_that_prepare_chooses(
    make_context: MakeContext, tmp_path: Path, tiny_llama: Path
) -> None:
    rows = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(120)]
    file = write_rows(tmp_path / "data" / "train.jsonl", rows)
    done = qlora("plan", "--data", file, "--model", tiny_llama)
    assert done.exit_code == 0, done.output
    chosen = prepare(make_context(OPEN), Recorded()).settings
    assert chosen_in(done.output) == [f"{each.setting} {each.value} {each.reason}".rstrip() for each in chosen]
    options = ["--model", f"pvc://models/{tiny_llama.name}", "--data", "pvc://rows/train.jsonl", "--name", "first"]
    folders = ["--volume", f"models={tiny_llama.parent}", "--volume", f"rows={file.parent}"]
    submitted = qlora("submit", *options, *folders, "--dry-run=client")
    assert submitted.stdout == "qlorajob.qlora.dev/first created (dry run)\n"
    assert chosen_in(submitted.stderr) == chosen_in(done.output)
    unread = qlora("submit", *options, "--dry-run=client")
    assert unread.stderr.startswith("15 settings are automatic: prepare chooses by the rows")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", "missing.jsonl does not exist; its folder has job.yaml, my rows.jsonl, table.xlsx"),
        ("my rows.jsonl", "no address of a job can have this file name"),
        ("table.xlsx", "table.xlsx does not end in .jsonl, .json or .csv"),
        ("job.yaml", "--model is for rows without a manifest, and "),
        ("ours/rows", "ours/rows does not exist; did you mean hf://ours/rows?"),
    ],
)
def test_what_holds_no_rows_is_rejected(tmp_path: Path, tiny_llama: Path, name: str, words: str) -> None:
    for present in ("my rows.jsonl", "table.xlsx", "job.yaml"):
        write_rows(tmp_path / present, [ROW])
    done = qlora("data", name if name == "ours/rows" else tmp_path / name, "--model", tiny_llama)
    assert done.exit_code in (ExitCode.BAD_CONFIGURATION, ExitCode.BAD_DATASET)
    assert words in done.output


def test_a_missing_or_linked_model_folder_is_rejected(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "train.jsonl", [ROW])
    spec = {"model": {"source": "pvc://models/tiny"}, "dataset": {"source": "pvc://data/train.jsonl"}}
    document = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": "tiny"}, "spec": spec}
    (tmp_path / "job.yaml").write_text(json.dumps(document))
    done = qlora("data", tmp_path / "job.yaml", "--volume", f"models={tmp_path}", "--volume", f"data={tmp_path}")
    assert done.exit_code == ExitCode.MODEL_UNAVAILABLE
    assert f"Error: {tmp_path / 'tiny'} does not exist: correct pvc://models/tiny, or give the folder" in done.output
    (tmp_path / "tiny").symlink_to(tiny_llama)
    for command in (("data", tmp_path / "job.yaml"), ("plan", tmp_path / "job.yaml")):
        linked = qlora(*command, "--volume", f"models={tmp_path}", "--volume", f"data={tmp_path}")
        assert linked.exit_code == ExitCode.UNSAFE_ARTIFACT
        assert "pvc://models/tiny is a link that leads out of its volume" in linked.output
    (tmp_path / "tiny").unlink()
    alone = qlora("data", tmp_path / "train.jsonl", "--model", tmp_path / "tiny")
    assert alone.exit_code == ExitCode.BAD_CONFIGURATION
    assert f"--model: {tmp_path / 'tiny'} is not a folder: name one, or an address such as hf:" in alone.output
    monkeypatch.chdir(tmp_path.parent)
    relative = f"{tmp_path.name}/tiny"
    assert f"--model: {relative} is not a folder" in qlora("data", tmp_path / "train.jsonl", "--model", relative).output


def test_rows_in_json_may_have_a_column_that_a_manifest_has(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{**ROW, "kind": "easy"}]))
    done = qlora("data", tmp_path / "rows.json")
    assert done.exit_code == 0
    assert "Not used: kind" in done.output
