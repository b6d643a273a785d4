"""The score of a finished adapter: on the rows of its base's, and continued."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

from qlora_api.contract import ExitCode
from qlora_api.spec.gate import GateSpec
from qlora_trainer.core.completion import EndOfTurn, PrepareRecord, TrainRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.evaluation import answer_batches
from qlora_trainer.evaluation.answers import Answering, AnswerTexts
from qlora_trainer.evaluation.prompts import Prompt, ScoredPrompts
from qlora_trainer.history.samples import read_samples
from qlora_trainer.publishing.gate import check_gate
from qlora_trainer.training.checkpoints.attempts import read_attempts
from tests.support.manifests import merged
from tests.support.models.tiny import VOCABULARY, Recorded, save_model
from tests.support.ranks import EXACT, TWO, succeeded, workspace
from tests.support.training import (
    ROW_LENGTHS,
    Lost,
    adapter_bytes,
    failure,
    guard_by_held_out,
    history,
    job,
    prepared,
    run,
    write_data,
    write_held_out,
)

PATTERN = {"check": "regex", "pattern": "[a-z]", "rows": 3, "maxNewTokens": 4}
SCORED = {"gate": {"minScore": 0.5, "score": PATTERN}}


class Watched(Recorded):
    """Records that act as soon as they report that the answer of this number is scored alone."""

    def __init__(self, number: int, act: Callable[[], None], activity: str = "") -> None:
        super().__init__()
        self._activity, self._act = activity or f"scoring answers {number} to {number} of 3", act

    def progress(self, record: Any, *, force: bool = False) -> None:
        super().progress(record, force=force)
        if record.activity == self._activity:
            self._act()


def lose() -> None:
    raise Lost


def answers(context: StepContext) -> list[dict[str, Any]]:
    """The lines of the answers' file, with its heading."""
    return [json.loads(line) for line in (context.workspace.report / "answers.jsonl").read_text().splitlines()]


def assert_is_of_its_answers(record: TrainRecord, context: StepContext) -> None:
    """Check the record's score against the file of answers, and the adapter of both."""
    heading, *lines = answers(context)
    assert record.score is not None
    assert heading == {"adapterSha256": record.adapter_sha256, "settings": record.score.settings}
    assert (record.score.rows, record.score.adapter_sha256) == (len(lines), record.adapter_sha256)
    assert record.score.adapter == sum(line["adapterPassed"] for line in lines) / len(lines)
    assert record.score.base == sum(line["basePassed"] for line in lines) / len(lines)
    assert any(line["adapter"] != line["base"] for line in lines)


@pytest.fixture
def scored(tmp_path: Path, tiny_llama: Path) -> StepContext:
    """A prepared workspace of a job whose answers are scored."""
    return prepared(tmp_path / "workspace", tiny_llama, SCORED)


def test_a_stopped_or_killed_score_is_continued_and_training_is_not_repeated(
    scored: StepContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_batches, "MOST_ROWS", 1)
    undisturbed = prepared(tmp_path / "undisturbed", tiny_llama, SCORED)
    expected = run(undisturbed)
    stop = StopRequest()

    with pytest.raises(Interrupted, match="interrupted at step 6 of 6; the checkpoint of step 6 is saved"):
        run(scored, stop=stop, records=Watched(2, stop.set))
    with pytest.raises(Lost):
        run(scored, records=Watched(3, lose))
    kept = answers(scored)
    with (scored.workspace.report / "answers.jsonl").open("ab") as file:
        file.write(b'{"torn')
    records = Recorded()
    record = run(scored, records=records)

    assert len(kept) == 3
    assert answers(scored) == answers(undisturbed)
    assert answers(scored)[:3] == kept
    assert record.score == expected.score
    assert_is_of_its_answers(record, scored)
    assert adapter_bytes(scored) == adapter_bytes(undisturbed)
    assert history(scored) == history(undisturbed)
    assert {entry["trainingStep"] for entry in records.written} == {6}
    assert read_completion(scored.workspace.completion("train"), TrainRecord) == record


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stopped_or_killed_guard_is_measured_again_and_training_is_not_repeated(
    stopped: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    guards = [{"name": name, "source": "pvc://data/near.jsonl", "maxLossIncrease": 1} for name in ("near", "far")]
    context, undisturbed = (
        guard_by_held_out(prepared(tmp_path / name, tiny_llama, {"gate": {"guards": guards}})) for name in ("a", "b")
    )
    expected, stop = run(undisturbed), StopRequest()

    with pytest.raises(Interrupted if stopped else Lost):
        run(context, stop=stop, records=Watched(0, stop.set if stopped else lose, "evaluating guard near"))
    records = Recorded()
    record = run(context, records=records)

    assert record.guards == expected.guards
    assert adapter_bytes(context) == adapter_bytes(undisturbed)
    assert {entry["trainingStep"] for entry in records.written} == {6}
    assert run(context) == record


def test_a_score_killed_within_a_batch_counts_the_answers_that_are_written(
    scored: StepContext, tmp_path: Path, tiny_llama: Path
) -> None:
    undisturbed = prepared(tmp_path / "undisturbed", tiny_llama, SCORED)
    expected = run(undisturbed)
    run(scored)
    path, record = scored.workspace.report / "answers.jsonl", scored.workspace.completion("train")
    heading, first, *_ = path.read_bytes().splitlines(keepends=True)
    written = json.loads(first) | {"adapterPassed": False, "basePassed": False}
    path.write_bytes(heading + json.dumps(written).encode() + b"\n")
    done = read_completion(record, TrainRecord)
    assert done is not None
    write_completion(record, done.model_copy(update={"score": None}))

    assert_is_of_its_answers(run(scored), scored)

    assert answers(scored)[1] == written
    assert answers(scored)[2:] == answers(undisturbed)[2:]
    assert expected.score is not None


def test_a_batch_without_memory_is_answered_row_by_row(
    scored: StepContext, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = prepared(tmp_path / "undisturbed", tiny_llama, SCORED)
    expected, generate = run(undisturbed), Answering.answers

    def limited(self: Answering, prompts: Sequence[Prompt], *, adapter: bool, max_new_tokens: int) -> list[str]:
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, prompts, adapter=adapter, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(Answering, "answers", limited)

    assert run(scored).score == expected.score
    assert len(answers(scored)) == 4


def note_data(context: StepContext, fingerprint: str) -> None:
    """Note the fingerprint of the prepared data, whose sequences stay the same."""
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    write_completion(path, record.model_copy(update={"data_content": {}, "fingerprint": fingerprint}))


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
def test_each_answer_is_checked_by_the_check_of_its_row(pairs: bool, tmp_path: Path, tiny_llama: Path) -> None:
    """All texts match the pattern of two packed rows, and none that of the others."""
    some, none = "^", "^(?!)"
    brought: dict[str, Any] = {
        "dataset": {"columns": {"check": "expected"}},
        "gate": {"score": {"check": "regex", "maxNewTokens": 2}},
        "training": {"objective": "dpo" if pairs else None},
    }
    checks = [some, none, none, some]
    context = prepared(tmp_path / "workspace", tiny_llama, brought, pairs=pairs, checks=checks)
    note_data(context, "rows")
    record = run(context)

    assert record.score is not None
    assert (record.score.rows, record.score.adapter, record.score.base) == (4, 0.5, 0.5)
    _, *lines = answers(context)
    assert [line["adapterPassed"] for line in lines] == [line["check"] == some for line in lines]
    # Each row has a different one: the prompts identify it.
    lengths = {check: {ROW_LENGTHS[row] // 2 for row in range(4) if checks[row] == check} for check in (some, none)}
    data = PreparedDataset.open(context.workspace.data / "rows", "eval")
    rows = ScoredPrompts.from_data(data, 4).chosen
    assert all(row.check is not None and len(row.tokens) in lengths[str(row.check.value)] for row in rows)

    # With other checks the same adapter has another score.
    checks = [some] * 4
    shutil.rmtree(context.workspace.data)
    write_data(context.workspace.data / "rows", packed=True, pairs=pairs, checks=checks)
    note_data(context, "other rows")
    again = run(context)
    assert again.adapter_sha256 == record.adapter_sha256
    assert again.score is not None
    assert again.score.adapter == 1.0
    gate = GateSpec.model_validate({"minScore": 0.9, **brought["gate"]})
    assert check_gate(gate, again, prepared="other rows") is not None
    with pytest.raises(StepFailure, match="a score by other settings"):
        check_gate(gate, record, prepared="other rows")


@pytest.mark.slow
def test_an_existing_adapter_is_scored_again_by_a_new_check_and_unchanged(scored: StepContext) -> None:
    first = run(scored)
    assert_is_of_its_answers(first, scored)
    before = adapter_bytes(scored)
    exact = {"check": "exactMatch", "rows": 2, "maxNewTokens": 4}
    own = dataclasses.replace(scored, document=job({"gate": {"score": exact}}))

    second = run(own)

    assert_is_of_its_answers(second, own)
    assert first.score is not None
    assert second.score is not None
    assert (first.score.rows, second.score.rows) == (3, 2)
    assert second.score.settings != first.score.settings
    assert second.adapter_sha256 == first.adapter_sha256
    assert adapter_bytes(own) == before
    # With only another limit there is nothing to do.
    records = Recorded()
    milder = dataclasses.replace(own, document=job({"gate": {"minScore": 0.1, "score": exact}}))
    assert run(milder, records=records) == second
    assert records.written == []


@pytest.mark.slow
def test_a_model_that_cannot_answer_ends_the_step_with_a_remedy(
    scored: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> list[str]:
        raise ValueError("no generation here")

    monkeypatch.setattr(Answering, "answers", fail)
    found = failure(scored)
    assert found.exit_code is ExitCode.BAD_CONFIGURATION
    assert found.message == (
        "spec.gate.score: the model could not answer (no generation here). The adapter is in trained/ of the "
        "workspace: create a job with continues: tiny and without gate.score and gate.minScore (if gate has nothing "
        "else, without it), which publishes the adapter and trains no further step"
    )
    assert (scored.workspace.trained / "adapter_model.safetensors").is_file()
    assert [attempt.ended for attempt in read_attempts(scored.workspace.records)] == ["failed"]

    adapter, records = adapter_bytes(scored), Recorded()
    monkeypatch.undo()
    assert_is_of_its_answers(run(scored, records=records), scored)
    assert {entry["trainingStep"] for entry in records.written} == {6}, "it trains nothing again"
    assert adapter_bytes(scored) == adapter
    assert [attempt.ended for attempt in read_attempts(scored.workspace.records)] == ["failed", "succeeded"]


@pytest.mark.slow
def test_samples_end_where_the_model_has_no_more_positions(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        word_embed_proj_dim=64,
    )
    model = save_model(tmp_path / "model", config)
    context = prepared(tmp_path / "workspace", model, {"training": {"maxSteps": 1, "samples": 1}})
    run(context)
    found = read_samples(context.workspace.report / "samples.json")
    assert (len(found.samples), found.missing) == (1, "")


def test_reasoning_that_the_prompt_begins_and_an_answer_does_not_end_has_not_passed(
    scored: StepContext, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"<|im_start|>user\n{name}<|im_end|>\n<think>\n", "thoughts</think>get") for name in ("one", "two")]
    write_held_out(scored.workspace.data / "rows", tiny_llama, rows)

    def answer(_: Answering, prompts: Sequence[Prompt], *, adapter: bool, max_new_tokens: int) -> list[str]:
        del max_new_tokens
        return ["thoughts</think>get" if adapter else "thoughts of get"] * len(prompts)

    monkeypatch.setattr(Answering, "answers", answer)
    record = run(scored)
    assert record.score is not None
    assert (record.score.rows, record.score.base, record.score.adapter) == (2, 0.0, 1.0)


def test_packing_does_not_change_the_answered_rows(tmp_path: Path) -> None:
    write_data(tmp_path / "packed", packed=True)
    write_data(tmp_path / "apart", packed=False)
    packed, apart = (PreparedDataset.open(tmp_path / name, "eval") for name in ("packed", "apart"))
    assert len(packed) < len(apart) == 4
    assert ScoredPrompts.from_data(packed, 3) == ScoredPrompts.from_data(apart, 3)
    assert len(ScoredPrompts.from_data(packed, 3).chosen) == 3
    assert len({prompt.sha256 for prompt in ScoredPrompts.from_data(packed, 100).chosen}) == 4


def test_an_answer_ends_where_the_model_was_taught_to_end_it(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens = tokenizer("get pods<end>and more").input_ids
    last = tokenizer.eos_token_id

    known = AnswerTexts(tiny_llama, None)
    assert known.answer(tokens) == "get pods<end>and more"
    assert (known.last_tokens(Prompt((1,), (5, last))), known.last_tokens(Prompt((1,), (5, 6)))) == ((last,), ())
    assert known.stop_strings is None
    pieces = AnswerTexts(tiny_llama, EndOfTurn(text="<end>"))
    assert (pieces.answer(tokens), pieces.stop_strings) == ("get pods", ["<end>"])
    taught = AnswerTexts(tiny_llama, EndOfTurn(text="<end>", token=0))
    assert (taught.last_tokens(Prompt((1,), (5, last))), taught.stop_strings) == ((last, 0), None)


def test_an_answer_is_not_generated_beyond_its_end(tiny_llama: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), LoraConfig(target_modules="all-linear"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prompt = Prompt(tuple(tokenizer("<|im_start|>user\nList").input_ids), (5,))
    output = model.generate(input_ids=torch.tensor([prompt.tokens]), do_sample=False, max_new_tokens=12)
    tokens = output[0, len(prompt.tokens) :].tolist()
    word = next(n for n, token in enumerate(tokens) if n and tokenizer.decode([token]).strip().isalpha())
    text = tokenizer.decode([tokens[word]])

    def generated(end: EndOfTurn | None) -> int:
        asked = itertools.count()
        answering = Answering(model, AnswerTexts(tiny_llama, end), lambda: next(asked) < 0, torch.device("cpu"))
        answering.answers([prompt], adapter=True, max_new_tokens=12)
        return next(asked)

    assert generated(None) == len(tokens) == 12
    assert generated(EndOfTurn(text=text, token=tokens[word])) == word + 1
    assert generated(EndOfTurn(text=text)) == word + 1


@pytest.mark.slow
def test_the_main_process_scores_the_adapter_of_both(tmp_path: Path, tiny_llama: Path) -> None:
    files, context = workspace(tmp_path / "together", tiny_llama, merged(merged(EXACT, TWO), SCORED), packed=False)
    succeeded(files.run("train"))
    record = read_completion(context.workspace.completion("train"), TrainRecord)
    assert record is not None
    assert record.ranks == 2
    assert_is_of_its_answers(record, context)
