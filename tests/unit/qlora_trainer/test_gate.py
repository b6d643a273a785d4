"""Whether an adapter is good enough to be published, from the records of training."""

from typing import Any

import pytest

from qlora_api.artifact_status import GateStatus
from qlora_api.contract import ExitCode
from qlora_api.schema import replace
from qlora_api.spec.gate import GateSpec
from qlora_trainer.core.completion import BenchmarkRecord, GuardRecord, Score, TrainRecord, score_settings
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.publishing.gate import check_gate, gate_failure

ADAPTER, OTHER, BASE = "a" * 64, "b" * 64, "c" * 64
EXACT = {"check": "exactMatch"}


def gate_of(**limits: Any) -> GateSpec:
    return GateSpec.model_validate(limits)


def trained(before: float | None = 2.0, after: float | None = 1.5, score: Score | None = None) -> TrainRecord:
    return TrainRecord(
        fingerprint="f",
        adapter_path="trained",
        adapter_sha256=ADAPTER,
        base_sha256=BASE,
        training_step=6,
        loss=1.0,
        initial_eval_loss=before,
        eval_loss=after,
        eval_tokens=88,
        score=score,
    )


def scored(adapter: float, base: float = 0.12, of: str = ADAPTER) -> Score:
    settings = score_settings(gate_of(score=EXACT).score or pytest.fail("it has one"))
    return Score(settings=settings, adapter_sha256=of, rows=50, too_long_rows=7, adapter=adapter, base=base)


def passed(gate: GateSpec, record: TrainRecord) -> dict[str, bool]:
    """Which of the limits are met, and `all`."""
    judged = check_gate(gate, record)
    assert judged is not None
    return {criterion.name: criterion.passed for criterion in judged.criteria} | {"all": judged.passed}


def test_without_a_gate_nothing_is_checked() -> None:
    assert check_gate(None, trained()) is None


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({"minImprovement": 0.25}, True),
        ({"minImprovement": 0.26}, False),
        ({"maxEvalLoss": 1.5}, True),
        ({"maxEvalLoss": 1.49}, False),
        ({"minScore": 0.94, "score": EXACT}, True),
        ({"minScore": 0.95, "score": EXACT}, False),
    ],
)
def test_a_limit_that_is_just_met_passes(limits: dict[str, Any], met: bool) -> None:
    name = next(iter(limits))
    assert passed(gate_of(**limits), trained(score=scored(0.94))) == {name: met, "all": met}


def test_every_limit_must_be_met() -> None:
    gate = gate_of(minImprovement=0.2, maxEvalLoss=1.2)
    assert passed(gate, trained()) == {"minImprovement": True, "maxEvalLoss": False, "all": False}


def test_a_loss_that_rose_has_not_improved() -> None:
    assert passed(gate_of(minImprovement=0), trained(before=1.5, after=1.6)) == {"minImprovement": False, "all": False}
    assert passed(gate_of(minImprovement=0), trained(before=0.0, after=0.1))["all"] is False
    assert passed(gate_of(minImprovement=0), trained(before=0.0, after=0.0))["all"] is True


def test_the_status_has_measurements_their_size_adapter_and_base() -> None:
    judged = check_gate(gate_of(minImprovement=0.5, score=EXACT), trained(score=scored(0.94)))
    assert judged is not None
    assert judged.dump() == {
        "passed": False,
        "adapterSha256": ADAPTER,
        "baseSha256": BASE,
        "criteria": [{"name": "minImprovement", "required": 0.5, "found": 0.25, "passed": False}],
        "evalLoss": 1.5,
        "initialEvalLoss": 2.0,
        "evalTokens": 88,
        "score": 0.94,
        "baseScore": 0.12,
        "scoreRows": 50,
        "scoreTooLongRows": 7,
    }


def test_losses_of_pairs_are_not_reported_per_token() -> None:
    judged = check_gate(gate_of(maxEvalLoss=0.7), trained(), pairs=True)
    assert judged is not None
    assert judged.eval_tokens is None


def test_a_score_without_a_limit_requires_nothing() -> None:
    assert passed(gate_of(score=EXACT), trained(score=scored(0.0))) == {"all": True}


def rejection(gate: GateSpec, record: TrainRecord) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        check_gate(gate, record)
    return failure.value


def test_a_score_of_another_adapter_is_rejected() -> None:
    failure = rejection(gate_of(minScore=0.5, score=EXACT), trained(score=scored(1.0, of=OTHER)))
    assert failure.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert OTHER in failure.message


@pytest.mark.parametrize(
    ("limits", "record", "words"),
    [
        ({"minScore": 0.5, "score": EXACT}, trained(), "training has measured no score"),
        ({"minScore": 0.5, "score": EXACT | {"rows": 7}}, trained(score=scored(1.0)), "a score by other settings"),
        ({"minImprovement": 0.1}, trained(before=None), "training has measured no loss on held-out rows"),
        ({"maxEvalLoss": 1.0}, trained(after=None), "training has measured no loss on held-out rows"),
    ],
)
def test_a_missing_measurement_is_rejected(limits: dict[str, Any], record: TrainRecord, words: str) -> None:
    failure = rejection(gate_of(**limits), record)
    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert words in failure.message


GUARD: dict[str, Any] = {"name": "chat", "source": "pvc://data/chat.jsonl"}


def guarded(loss: float, score: Score | None = None, *, of: str = ADAPTER, prepared: str = "") -> TrainRecord:
    """The record of an adapter with this loss on the rows of a guard, where its base has 1.5."""
    found = GuardRecord(
        name="chat", prepared=prepared, sha256=BASE, adapter_sha256=of, tokens=40, base_loss=1.5, loss=loss, score=score
    )
    return replace(trained(score=score), guards=(found,))


def test_a_guard_fails_the_gate_alone_and_the_failure_has_its_numbers() -> None:
    gate = gate_of(maxEvalLoss=2, score=EXACT, guards=[GUARD | {"maxLossIncrease": 0.25, "minScore": 0.95}])
    for loss, score, reasons in (
        (1.75, 0.95, []),
        (1.0, 0.95, []),
        (2.0, 0.95, ["guards[chat].maxLossIncrease is 0.25, and the loss on its rows changed by +0.5000, from 1.5000"]),
        (1.5, 0.5, ["guards[chat].minScore is 0.95, and 0.5 of the adapter's answers to 50 held-out rows passed"]),
    ):
        judged = check_gate(gate, guarded(loss, scored(score)))
        assert judged is not None
        assert judged.passed == (not reasons)
        assert all(f"spec.gate.{reason}" in gate_failure(judged, "trained").message for reason in reasons)
        (guard,) = judged.guards or ()
        assert (guard.loss, guard.base_loss, guard.tokens, guard.score, guard.sha256) == (loss, 1.5, 40, score, BASE)
        assert judged.base_sha256 == BASE


def test_a_guard_that_was_not_measured_on_these_rows_or_this_adapter_is_rejected() -> None:
    gate = gate_of(guards=[GUARD | {"maxLossIncrease": 1}])
    for record in (trained(), guarded(1.5, prepared="other rows")):
        failure = rejection(gate, record)
        assert failure.exit_code is ExitCode.BAD_CONFIGURATION
        assert "spec.gate.guards[chat]: training has measured no loss on its rows" in failure.message
    assert rejection(gate, guarded(1.5, of=OTHER)).exit_code is ExitCode.UNSAFE_ARTIFACT


def benchmarked(adapter: float, of: str = ADAPTER, **settings: Any) -> TrainRecord:
    found = {"task": "arc", "metric": "acc", "limit": 200, "rows": 10} | settings
    sums = {"tasks_sha256": BASE, "adapter_sha256": of}
    return replace(trained(), benchmarks=(BenchmarkRecord(adapter=adapter, base=0.8, **sums, **found),))


def test_a_benchmark_fails_the_gate_alone_and_is_reported_without_limits() -> None:
    for limits, score, reasons in (
        ({}, 0.1, []),
        ({"maxDrop": 0.1, "minScore": 0.7}, 0.7, []),
        ({"maxDrop": 0.1}, 0.6, ["maxDrop is 0.1, and acc on 10 rows is 0.6 with the adapter and 0.8 without it"]),
        ({"minScore": 0.7}, 0.6, ["minScore is 0.7, and acc on 10 rows is 0.6 with the adapter and 0.8 without it"]),
    ):
        judged = check_gate(gate_of(benchmarks=[{"task": "arc", **limits}]), benchmarked(score))
        assert judged is not None
        assert judged.passed == (not reasons)
        assert all(f"spec.gate.benchmarks[arc].{why}" in gate_failure(judged, "trained").message for why in reasons)
        (benchmark,) = judged.benchmarks or ()
        assert (benchmark.score, benchmark.base_score, benchmark.rows) == (score, 0.8, 10)
        assert judged.benchmarks_sha256 == BASE


def test_a_benchmark_that_was_not_measured_so_or_of_this_adapter_is_rejected() -> None:
    gate = gate_of(benchmarks=[{"task": "arc"}])
    for record in (trained(), benchmarked(0.8, limit=100), benchmarked(0.8, metric="acc_norm")):
        failure = rejection(gate, record)
        assert failure.exit_code is ExitCode.BAD_CONFIGURATION
        assert "spec.gate.benchmarks[arc]: training has measured no score" in failure.message
    assert rejection(gate, benchmarked(0.8, of=OTHER)).exit_code is ExitCode.UNSAFE_ARTIFACT


def test_the_failure_has_the_numbers_and_a_remedy() -> None:
    gate = gate_of(minImprovement=0.5, maxEvalLoss=1.2, minScore=0.95, score=EXACT)
    judged: GateStatus | None = check_gate(gate, trained(score=scored(0.94)))
    assert judged is not None
    failure = gate_failure(judged, "pvc://work/tune/trained")
    assert failure.exit_code is ExitCode.GATE_FAILED
    for words in (
        "spec.gate.minImprovement is 0.5, and the held-out loss changed by -25.00%, from 2.0000 before training to 1.5",
        "spec.gate.maxEvalLoss is 1.2, and the held-out loss is 1.5000",
        "spec.gate.minScore is 0.95, and 0.94 of the adapter's answers to 50 held-out rows passed (of the base's 0.12)",
        "it stays in pvc://work/tune/trained",
        "set a new spec.retry.request",
    ):
        assert words in failure.message
