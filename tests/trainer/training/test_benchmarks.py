"""The benchmarks of a gate: as the harness by itself scores them, from a folder that is as the profile pins it."""

import json
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import TrainRecord, read_completion
from qlora_trainer.core.context import StepContext, TaskFolder
from qlora_trainer.core.failures import Interrupted, StopRequest
from tests.support.models.tiny import Recorded
from tests.support.training import failure, prepared, run

WORDS = ("red", "green", "blue", "the", "a", "of", "to", "and", "in", "is")
TASKS = {
    "colors": """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: brier_score, higher_is_better: false}]
""",
    "words": """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
SHA256 = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"


@pytest.fixture
def tasks(tmp_path: Path) -> TaskFolder:
    """A folder with two tasks, and its checksum as the documentation computes it."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text)
    rows = (
        {
            "question": f"{WORDS[n % 10]} {WORDS[n * 3 % 7]}",
            "choices": [f" {WORDS[n % 3]}", f" {WORDS[n % 9]} a"],
            "answer": n % 2,
        }
        for n in range(24)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run_command(["sh", "-c", SHA256], cwd=folder, capture_output=True, check=True, text=True).stdout
    return TaskFolder(folder, printed.split()[0])


def benchmarked(root: Path, model: Path, tasks: TaskFolder, *benchmarks: dict[str, Any]) -> StepContext:
    context = prepared(root, model, {"gate": {"benchmarks": list(benchmarks)}})
    return replace(context, mounts=replace(context.mounts, tasks=tasks))


COLORS = {"task": "colors", "rows": 20}
BOTH = (COLORS, {"task": "words", "metric": "exact_match", "rows": 8})


def scores_of_the_harness(model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """What lm-evaluation-harness measures on a model that it is given, with nothing of ours."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with chdir(folder):
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        harness = HFLM(pretrained=model, tokenizer=tokenizer, mixed_precision_dtype="bfloat16", batch_size=1)
        measured = {}
        for task, key, rows in (("colors", "acc,none", 20), ("words", "exact_match,none", 8)):
            found = simple_evaluate(harness, tasks=[task], task_manager=manager, limit=rows, bootstrap_iters=0)
            measured[task] = found["results"][task][key]
    return measured


def test_scores_are_those_of_the_harness_by_itself(tmp_path: Path, tiny_llama: Path, tasks: TaskFolder) -> None:
    context = benchmarked(tmp_path / "job", tiny_llama, tasks, *BOTH)
    record = run(context)

    base = AutoModelForCausalLM.from_pretrained(
        context.workspace.base, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    without = scores_of_the_harness(base, tokenizer, tasks.path)
    adapted = PeftModel.from_pretrained(base, str(context.workspace.trained)).eval()
    assert {each.task: each.base for each in record.benchmarks} == without
    assert {each.task: each.adapter for each in record.benchmarks} == scores_of_the_harness(
        adapted, tokenizer, tasks.path
    )
    assert [each.rows for each in record.benchmarks] == [20, 8]
    assert {each.tasks_sha256 for each in record.benchmarks} == {tasks.sha256}


def test_a_stopped_benchmark_is_measured_again_and_the_earlier_ones_are_kept(
    tmp_path: Path, tiny_llama: Path, tasks: TaskFolder
) -> None:
    context, undisturbed = (benchmarked(tmp_path / name, tiny_llama, tasks, *BOTH) for name in ("a", "b"))
    expected, stop = run(undisturbed), StopRequest()

    class Stopping(Recorded):
        def progress(self, record: Any, *, force: bool = False) -> None:
            if "benchmark words" in record.activity:
                stop.set()

    with pytest.raises(Interrupted):
        run(context, stop=stop, records=Stopping())
    kept = read_completion(context.workspace.completion("train"), TrainRecord)
    records = Recorded()
    record = run(context, records=records)

    assert kept is not None
    assert kept.benchmarks == expected.benchmarks[:1]
    assert record.benchmarks == expected.benchmarks
    assert not [entry for entry in records.written if "colors" in entry["activity"]]
    assert run(context) == record


def test_a_changed_folder_is_not_read(tmp_path: Path, tiny_llama: Path, tasks: TaskFolder) -> None:
    (tasks.path / "words.py").write_text("raise SystemExit")

    ended = failure(benchmarked(tmp_path / "job", tiny_llama, tasks, COLORS))

    assert ended.exit_code == ExitCode.UNSAFE_ARTIFACT
    assert f"evaluation.sha256 of the profile is {tasks.sha256}" in ended.message


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ({"task": "shapes"}, "benchmarks[0].task is shapes, and the folder of tasks has: colors, words"),
        ({"task": "colors", "metric": "brier_score"}, "that are better if higher are: acc"),
        ({"task": "colors", "metric": "f1"}, "that are better if higher are: acc"),
    ],
)
def test_a_task_that_cannot_be_run_ends_the_job_before_training(
    benchmark: dict[str, Any], message: str, tmp_path: Path, tiny_llama: Path, tasks: TaskFolder
) -> None:
    records = Recorded()

    ended = failure(benchmarked(tmp_path / "job", tiny_llama, tasks, benchmark), records=records)

    assert ended.exit_code == ExitCode.BAD_CONFIGURATION
    assert message in ended.message
    assert not records.written
