"""An adapter that fails its gate is not published until the gate lets it pass."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import OPTConfig

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.spec.gate import ScoreSpec
from qlora_trainer.core.completion import (
    PrepareRecord,
    Score,
    TrainRecord,
    read_completion,
    score_settings,
    write_completion,
)
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import classify, result_record
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.evaluation.answer_check import AnswerChecker
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.prompts import ScoredPrompts
from qlora_trainer.evaluation.scorable import row_criterion
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.commands.command import ROWS, Files, new_files
from tests.support.failures import failing
from tests.support.models.tiny import POD_UID, VOCABULARY, Recorded, chat_row, save_model, write_rows
from tests.support.runs.published import context, published
from tests.support.runs.report_page import Page
from tests.support.training import run
from tests.trainer.conftest import MakeContext

OUTPUT = {"destination": "pvc://data/adapter", "merged": {"destination": "pvc://data/merged"}}
EXACT = {"check": "exactMatch"}
GUARD = {"name": "chat", "source": "pvc://data/chat.jsonl"}


def gated(files: Files, gate: dict[str, Any] | None) -> Files:
    """The same job with this gate, and with destinations outside of the workspace."""
    return replace(files, spec={**files.spec, "output": OUTPUT} | ({} if gate is None else {"gate": gate}))


def with_score(files: Files, adapter: float, *, of: str | None = None, too_long: int = 0) -> TrainRecord:
    """The record of training, with a score of exact matches."""
    path = files.workspace / "records" / "train.json"
    record = read_completion(path, TrainRecord)
    assert record is not None
    score = Score(
        settings=score_settings(ScoreSpec.model_validate(EXACT)),
        adapter_sha256=of or record.adapter_sha256,
        rows=10,
        too_long_rows=too_long,
        adapter=adapter,
        base=0.1,
    )
    record = record.model_copy(update={"score": score})
    write_completion(path, record)
    return record


def with_template(files: Files) -> bytes:
    """Add a job's chat template to the record of prepare, and next to the rows."""
    path = files.workspace / "records" / "prepare.json"
    record = read_completion(path, PrepareRecord)
    assert record is not None
    content = b"{{ messages }}"
    (files.workspace / record.data_path / "chat_template.jinja").write_bytes(content)
    write_completion(path, record.model_copy(update={"template_sha256": sha256(content).hexdigest()}))
    return content


def held_back(files: Files) -> tuple[StepFailure, Recorded]:
    """Publish, which must fail; returns its reports."""
    records = Recorded()
    with pytest.raises(StepFailure) as failure:
        publish(context(files), records, now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert not (files.workspace / "records" / "publish.json").exists()
    assert sorted(path.name for path in files.data.iterdir()) == ["train.jsonl"]
    assert not (files.workspace / "adapter").exists()
    return failure.value, records


def test_an_adapter_that_does_not_pass_stays_in_the_workspace_and_describes_itself(trained: Files) -> None:
    record = with_score(trained, 0.6, too_long=7)
    gate = {"minImprovement": 0.9, "maxEvalLoss": 100.0, "minScore": 0.8, "score": EXACT}

    failure, records = held_back(gated(trained, gate))

    assert failure.exit_code is ExitCode.GATE_FAILED
    assert "spec.gate.minScore is 0.8, and 0.6 of the adapter's answers to 10 held-out rows passed" in failure.message
    assert "it stays in pvc://work/tiny-7d0c2f5e/trained" in failure.message
    assert "maxEvalLoss" not in failure.message
    last = result_record(
        classify(failure), None, records.findings, step="publish", job_uid="u", pod_uid=POD_UID, attempt=1,
        time="2026-01-02T00:00:00Z",
    )  # fmt: skip
    assert (last.exit_code, last.reason) == (20, "GateFailed")
    assert last.gate is not None
    assert (last.gate.passed, last.gate.adapter_sha256) == (False, record.adapter_sha256)
    assert {criterion.name: criterion.passed for criterion in last.gate.criteria} == {
        "minImprovement": False,
        "maxEvalLoss": True,
        "minScore": False,
    }
    summary = json.loads((trained.workspace / "report" / "summary.json").read_text())
    assert summary["gate"] == last.gate.dump()
    page = Page((trained.workspace / "report" / "report.html").read_text()).words
    assert "Not passed: the adapter was not published." in page
    assert "Answers that passed 60.0% 10.0% without the adapter, on the same 10 held-out rows; check exactMatch" in page
    judged_on = (
        f"The held-out losses are means over {record.eval_tokens} target tokens. The held-out rows that were not "
        "answered, 7, have a prompt of more than 1024 tokens."
    )
    assert judged_on in page
    card = ModelCard.load(trained.workspace / "trained" / "README.md").text
    assert "| minScore | 0.8 | 0.6 | no |" in card
    assert "has not passed, and was not published" in card
    assert judged_on in card
    assert "(loss.png)" in card
    assert (trained.workspace / "trained" / "loss.png").is_file()
    assert "manifest.json" not in card


def test_an_adapter_that_does_not_pass_keeps_the_chat_template_that_its_card_names(trained: Files) -> None:
    template = with_template(trained)
    held_back(gated(trained, {"maxEvalLoss": 0.01}))
    clean(WorkspaceLayout(trained.workspace))
    folder = trained.workspace / "trained"
    assert "`chat_template.jinja`" in (folder / "README.md").read_text()
    assert (folder / "chat_template.jinja").read_bytes() == template


def test_it_is_published_without_training_once_the_gate_lets_it_pass(trained: Files) -> None:
    with_score(trained, 0.6)
    held_back(gated(trained, {"minScore": 0.8, "score": EXACT}))
    mild = replace(trained, spec={**trained.spec, "gate": {"minScore": 0.6, "score": EXACT}})

    record = published(mild)

    assert record.gate is not None
    assert (record.gate.passed, record.gate.score, record.gate.base_score) == (True, 0.6, 0.1)
    folder = trained.workspace / "adapter"
    card = ModelCard.load(folder / "README.md").text
    assert "Of the answers to 10 held-out rows 60.0 % passed the check" in card
    assert "| minScore | 0.6 | 0.6 | yes |" in card
    # The objects at the destination do not depend on the limits: a run with others finds them there.
    assert published(mild) == record
    with failing(ExitCode.GATE_FAILED):
        published(replace(mild, spec={**mild.spec, "gate": {"maxEvalLoss": 0.01}}))


def test_the_gate_rejects_a_score_of_another_or_changed_adapter(trained: Files) -> None:
    with_score(trained, 1.0, of="0" * 64)
    failure, _ = held_back(gated(trained, {"minScore": 0.5, "score": EXACT}))
    assert failure.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert "is of the adapter with sha256 " + "0" * 64 in failure.message

    with_score(trained, 0.0)
    adapter = trained.workspace / "trained" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\xff")
    failure, _ = held_back(gated(trained, {"minScore": 0.5, "score": EXACT}))
    assert failure.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert "was changed or damaged afterwards" in failure.message


ANSWERS = [chat_row(f"Which pods has n{i}?", f'{{"pods": {i}}}') for i in range(12)]


@pytest.mark.parametrize(
    ("score", "rows", "words"),
    [
        ({"check": "regex", "pattern": "(pods"}, ANSWERS, "pattern is no regular expression"),
        (
            {"check": "regex", "pattern": "^kubectl"},
            ANSWERS,
            "not one of the data set's own answers to the 3 held-out rows",
        ),
        (EXACT, [{"text": f"pods of n{i} and others"} for i in range(12)], "rows of format text have none"),
    ],
    ids=["pattern", "pattern that nothing passes", "no prompts"],
)
def test_prepare_rejects_a_score_that_no_adapter_could_have(
    score: dict[str, Any], rows: list[dict[str, Any]], words: str, make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    job = make_context({"dataset": {"eval": {"fraction": 0.25}}, "gate": {"minScore": 0.5, "score": score}})

    with failing(ExitCode.BAD_CONFIGURATION, words):
        prepare(job, Recorded())

    assert not job.workspace.base.exists()


def test_prepare_rejects_a_score_of_a_guard_that_no_adapter_could_have(
    make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ANSWERS)
    write_rows(tmp_path / "data" / "chat.jsonl", [chat_row("Hello.", "Hi.")])
    gate = {"score": {"check": "regex", "pattern": "pods"}, "guards": [GUARD | {"minScore": 0.5}]}
    words = "spec.gate.score of guards[chat]: not one of the data set's own answers to the 1 held-out rows passes"
    with failing(ExitCode.BAD_CONFIGURATION, words):
        prepare(make_context({"dataset": {"eval": {"fraction": 0.25}}, "gate": gate}), Recorded())


def test_other_rows_of_a_guard_are_measured_without_another_step(make_context: MakeContext, tmp_path: Path) -> None:
    """As after `qlora run` with a manifest that was changed, or for a job that continues another."""
    write_rows(tmp_path / "data" / "train.jsonl", ANSWERS)
    context = make_context({"training": {"maxSteps": 2}, "gate": {"guards": [GUARD | {"maxLossIncrease": 9}]}})
    measured: list[TrainRecord] = []
    steps: set[int] = set()
    for answer in ("Hi.", "Bye."):
        write_rows(tmp_path / "data" / "chat.jsonl", [chat_row("Hello.", answer)])
        prepare(context, Recorded())
        records = Recorded()
        measured.append(run(context, records=records))
        steps = {entry["trainingStep"] for entry in records.written}
    first, second = measured
    assert first.adapter_sha256 == second.adapter_sha256
    assert first.guards[0].base_loss != second.guards[0].base_loss
    assert second.guards[0].sha256 == sha256((tmp_path / "data" / "chat.jsonl").read_bytes()).hexdigest()
    assert steps == {2}


def test_prepare_admits_a_score_that_the_data_has_and_data_and_run_stay_the_same(
    make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ANSWERS)
    held_out = {"dataset": {"eval": {"fraction": 0.25}}}
    schema = '{"required": ["pods"], "properties": {"pods": {"type": "integer"}}}'
    score = {"check": "jsonSchema", "schema": schema}
    scored = prepare(make_context(held_out | {"gate": {"minScore": 0.5, "score": score}}), Recorded())
    partly = prepare(make_context(held_out | {"gate": {"score": {"check": "regex", "pattern": "[5-9]"}}}), Recorded())
    assert "the data set's own answers to" in partly.remarks[-1]
    without = prepare(make_context(held_out), Recorded())
    assert without == scored.model_copy(update={"memory": without.memory})
    assert without.fingerprint == partly.fingerprint


def brought(answers: list[Any], kind: str = "regex") -> dict[str, Any]:
    """Return a spec with answers' checks in column `expected`, and a quarter held out."""
    return {
        "dataset": {"eval": {"fraction": 0.25}, "columns": {"check": "expected"}},
        "gate": {"minScore": 0.5, "score": {"check": kind, "rows": len(answers)}},
    }


def with_checks(checks: list[Any]) -> list[dict[str, Any]]:
    return [row | {"expected": check} for row, check in zip(ANSWERS, checks, strict=True)]


OWN = [f"^.{{0,9}} {i}}}$" for i in range(12)]
"""Of each row a pattern that its own answer has, and no other row's."""
SCHEMAS = [{"required": ["pods"], "properties": {"pods": {"const": i}}} for i in range(12)]


@pytest.mark.parametrize(
    ("kind", "checks"),
    [
        ("regex", OWN),
        pytest.param("jsonSchema", SCHEMAS, marks=pytest.mark.slow),
        pytest.param("jsonSchema", [json.dumps(schema) for schema in SCHEMAS], marks=pytest.mark.slow),
    ],
    ids=["patterns", "schemas", "schemas as text"],
)
def test_each_held_out_row_is_checked_by_its_check(
    kind: str, checks: list[Any], make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", with_checks(checks))
    job = make_context(brought(checks, kind))
    record = prepare(job, Recorded())
    assert not any(remark.startswith("spec.gate.score") for remark in record.remarks)

    data = PreparedDataset.open(job.workspace.root / record.data_path, "eval")
    texts = AnswerTexts(job.workspace.root / record.model_path, record.end_of_turn)
    spec = ScoreSpec.model_validate({"check": kind})
    rows = ScoredPrompts.from_data(data, 12).chosen
    with AnswerChecker(spec) as checker:
        for answered in rows:
            criterion = row_criterion(spec, answered)
            found = [checker.passes(texts.answer(row.answer), "", criterion) for row in rows]
            assert found == [row == answered for row in rows]
    # The same rows without their checks are the same sequences, which identify runs for a comparison.
    without = prepare(make_context({"dataset": {"eval": {"fraction": 0.25}}}), Recorded())
    assert without.fingerprint != record.fingerprint
    assert {**(without.data_content or {}), "rows": 0} == {**(record.data_content or {}), "rows": 0}


def test_a_row_whose_check_cannot_be_read_is_named(make_context: MakeContext, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", with_checks(["(pods"] * 12))
    with failing(ExitCode.BAD_DATASET) as failure:
        prepare(make_context(brought(OWN)), Recorded())
    assert re.match(
        r"pvc://data/train.jsonl line \d+: 'expected' is no regular expression of Python: missing \), .*: correct it",
        failure.value.message,
    )


@pytest.mark.slow
def test_with_held_out_rows_of_their_own_source_only_these_bring_checks(
    make_context: MakeContext, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "train.jsonl", ANSWERS[:8])
    write_rows(tmp_path / "data" / "held-out.jsonl", with_checks(OWN)[8:])
    job = brought(OWN)
    job["dataset"]["eval"] = {"source": "pvc://data/held-out.jsonl"}
    record = prepare(make_context(job), Recorded())
    assert (record.dataset.used_rows, record.dataset.eval_rows) == (8, 4)


def test_an_answer_beyond_the_models_positions_is_rejected_before_training(
    make_context: MakeContext, tmp_path: Path
) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=72,
        word_embed_proj_dim=64,
    )
    model = save_model(tmp_path / "models" / "opt", config)
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Show {number}.", "get pods") for number in range(12)])

    def scored(new_tokens: int) -> dict[str, Any]:
        score = {"check": "regex", "pattern": "pods", "maxNewTokens": new_tokens}
        return {
            "dataset": {"eval": {"fraction": 0.2}},
            "training": {"maxSequenceLength": 64},
            "gate": {"minScore": 0, "score": score},
        }

    context = make_context(scored(64), model=model)
    with pytest.raises(StepFailure, match=r"spec\.gate\.score\.maxNewTokens is 64, and the longest prompt") as failure:
        prepare(context, Recorded())
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    allowed = re.search(r"set maxNewTokens to (\d+) or less", failure.value.message)
    assert allowed is not None

    record = prepare(make_context(scored(int(allowed[1])), model=model), Recorded())
    assert record.fixed_positions == 72
    # Nor by data of an earlier attempt.
    with pytest.raises(StepFailure, match=r"spec\.gate\.score\.maxNewTokens is 64, and the longest prompt"):
        prepare(context, Recorded())


@pytest.mark.slow
def test_the_command_line_gates_an_adapter_by_the_checks_of_its_rows(tmp_path: Path, tiny_llama: Path) -> None:
    """The rows ask for words that the tiny model never generates, or for anything."""
    files = new_files(tmp_path, tiny_llama.parent)
    write_rows(files.data / "train.jsonl", ROWS)
    held_out = [row | {"expected": "^kubectl" if number % 2 else "^"} for number, row in enumerate(ROWS[:4])]
    write_rows(files.data / "held-out.jsonl", held_out)
    files = files.with_spec(
        {
            "dataset": {"eval": {"fraction": None, "source": "pvc://data/held-out.jsonl"}}
            | {"columns": {"check": "expected"}},
            "gate": {"minScore": 0.5, "score": {"check": "regex", "maxNewTokens": 16}},
            "training": {"maxSteps": 2, "samples": 0},
        }
    )

    results = [files.run(step) for step in ("prepare", "train", "publish")]

    assert [done.exit_code for done in results] == [0, 0, 0], results[-1].stdout + results[-1].stderr
    judged = results[-1].result.gate
    assert judged is not None
    assert (judged.passed, judged.score, judged.score_rows) == (True, 0.5, 4)
    strict = files.with_spec({"gate": {"minScore": 0.6}}).run("publish")
    assert strict.exit_code == ExitCode.GATE_FAILED
