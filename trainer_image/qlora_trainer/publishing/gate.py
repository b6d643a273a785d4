"""Decides whether a trained adapter is good enough to be published."""

from collections.abc import Iterator
from math import isclose
from typing import Any

from qlora_api.artifact_status import BenchmarkStatus, GateCriterion, GateStatus, GuardStatus
from qlora_api.contract import ExitCode
from qlora_api.spec.gate import BenchmarkSpec, GateSpec, GuardSpec
from qlora_trainer.core.completion import BenchmarkRecord, GuardRecord, Score, TrainRecord
from qlora_trainer.core.failures import StepFailure, bad_configuration, unsafe_artifact


def check_gate(
    gate: GateSpec | None, trained: TrainRecord, *, pairs: bool = False, prepared: str = ""
) -> GateStatus | None:
    """The gate's result for the adapter that training recorded, or None without a gate.

    `pairs`: the losses are means over pairs of answers, not over target tokens. `prepared`: fingerprint of the data.

    Raises StepFailure: BAD_CONFIGURATION if training has not measured what the gate asks for, UNSAFE_ARTIFACT if it has
    measured another adapter.
    """
    if gate is None:
        return None
    _require_measured(gate, trained, prepared)
    measured = {guard.name: guard for guard in trained.guards}
    guards = tuple(_guard_status(guard, measured[guard.name]) for guard in gate.guards or ())
    found = tuple(
        (spec, record) for spec in gate.benchmarks or () for record in trained.benchmarks if record.is_of(spec)
    )
    benchmarks = tuple(_benchmark_status(*each) for each in found)
    criteria = tuple(_criteria(gate, trained))
    of_guards = (limit for guard in guards for limit in guard.criteria)
    of_benchmarks = (limit for benchmark in benchmarks for limit in benchmark.criteria)
    limits = (*criteria, *of_guards, *of_benchmarks)
    return GateStatus(
        passed=all(limit.passed for limit in limits),
        adapter_sha256=trained.adapter_sha256,
        base_sha256=trained.base_sha256 or None,
        criteria=criteria,
        eval_loss=trained.eval_loss,
        initial_eval_loss=trained.initial_eval_loss,
        eval_tokens=None if pairs else trained.eval_tokens,
        guards=guards or None,
        benchmarks=benchmarks or None,
        benchmarks_sha256=found[0][1].tasks_sha256 if found else None,
        **_score(trained.score if gate.score is not None else None),
    )


def _require_measured(gate: GateSpec, trained: TrainRecord, prepared: str) -> None:
    """Raise StepFailure unless training has measured all that the gate asks for, of the adapter that it has written."""
    if missing := trained.missing_measurement(gate, prepared):
        raise bad_configuration(
            f"{missing}, and publish has no GPU to measure it: restore spec.gate as it was, or run the train step "
            "again with it"
        )
    scores = [score for score in (trained.score, *(guard.score for guard in trained.guards)) if score is not None]
    measured = [*(score.adapter_sha256 for score in scores), *(guard.adapter_sha256 for guard in trained.guards)]
    for sha256 in (*measured, *(benchmark.adapter_sha256 for benchmark in trained.benchmarks)):
        if sha256 != trained.adapter_sha256:
            raise unsafe_artifact(
                f"what records/train.json has for spec.gate is of the adapter with sha256 {sha256}, and training has "
                f"written {trained.adapter_sha256}: it is not published; create the job again"
            )


def _score(score: Score | None) -> dict[str, Any]:
    """The fields of a status for the score."""
    if score is None:
        return {}
    return {
        "score": score.adapter,
        "base_score": score.base,
        "score_rows": score.rows,
        "score_too_long_rows": score.too_long_rows,
    }


def _guard_status(guard: GuardSpec, found: GuardRecord) -> GuardStatus:
    criteria, increase = [], found.loss - found.base_loss
    if (most := guard.max_loss_increase) is not None:
        criteria.append(_criterion("maxLossIncrease", most, increase, passed=increase <= most))
    if guard.min_score is not None and found.score is not None:
        criteria.append(_min_score(guard.min_score, found.score))
    return GuardStatus(
        name=guard.name,
        sha256=found.sha256,
        loss=found.loss,
        base_loss=found.base_loss,
        tokens=found.tokens,
        criteria=tuple(criteria),
        **_score(found.score if guard.min_score is not None else None),
    )


def _benchmark_status(spec: BenchmarkSpec, found: BenchmarkRecord) -> BenchmarkStatus:
    criteria, drop = [], found.base - found.adapter
    if (least := spec.min_score) is not None:
        criteria.append(_criterion("minScore", least, found.adapter, passed=found.adapter >= least))
    if (most := spec.max_drop) is not None:
        # 0.8 - 0.7 is more than 0.1.
        criteria.append(_criterion("maxDrop", most, drop, passed=drop <= most or isclose(drop, most)))
    return BenchmarkStatus(
        task=found.task,
        metric=found.metric,
        score=found.adapter,
        base_score=found.base,
        rows=found.rows,
        criteria=tuple(criteria),
    )


def _criteria(gate: GateSpec, trained: TrainRecord) -> Iterator[GateCriterion]:
    if gate.min_improvement is not None:
        before, after = _eval_losses(trained)
        # A loss of 0 before training can only be kept.
        found = (before - after) / before if before else -after
        yield _criterion("minImprovement", gate.min_improvement, found, passed=found >= gate.min_improvement)
    if gate.max_eval_loss is not None:
        _, loss = _eval_losses(trained)
        yield _criterion("maxEvalLoss", gate.max_eval_loss, loss, passed=loss <= gate.max_eval_loss)
    if gate.min_score is not None and trained.score is not None:
        yield _min_score(gate.min_score, trained.score)


def _min_score(required: float, score: Score) -> GateCriterion:
    return _criterion("minScore", required, score.adapter, passed=score.adapter >= required)


def _criterion(name: str, required: float, found: float, *, passed: bool) -> GateCriterion:
    return GateCriterion(name=name, required=required, found=found, passed=passed)


def _eval_losses(trained: TrainRecord) -> tuple[float, float]:
    if trained.initial_eval_loss is None or trained.eval_loss is None:
        raise bad_configuration(
            "spec.gate: training has measured no loss on held-out rows: create the job again with spec.dataset.eval, "
            "or remove minImprovement and maxEvalLoss"
        )
    return trained.initial_eval_loss, trained.eval_loss


def gate_failure(gate: GateStatus, folder: str) -> StepFailure:
    """Why the adapter in `folder` is not published."""
    reasons = "; ".join(
        _reason(f"spec.gate.{prefix}{criterion.name} is {criterion.required:g}", measured, criterion)
        for prefix, measured in gate.sets.items()
        for criterion in measured.criteria
        if not criterion.passed
    )
    return StepFailure(
        ExitCode.GATE_FAILED,
        f"{reasons}. The adapter is not published: it stays in {folder}, and report/report.html describes it. Train on "
        "more or better data, or change the limits in spec.gate and set a new spec.retry.request to publish it as it "
        "is",
    )


def _reason(required: str, measured: GateStatus | GuardStatus | BenchmarkStatus, criterion: GateCriterion) -> str:
    if isinstance(measured, BenchmarkStatus):
        scores = f"{measured.score:.4g} with the adapter and {measured.base_score:.4g} without it"
        return f"{required}, and {measured.metric} on {measured.rows} rows is {scores}"
    if criterion.name == "minScore":
        return (
            f"{required}, and {criterion.found:.4g} of the adapter's answers to {measured.score_rows} held-out rows "
            f"passed (of the base's {measured.base_score:.4g})"
        )
    if isinstance(measured, GuardStatus):
        losses = f"from {measured.base_loss:.4f} without the adapter to {measured.loss:.4f}"
        return f"{required}, and the loss on its rows changed by {criterion.found:+.4f}, {losses}"
    losses = f"from {measured.initial_eval_loss:.4f} before training to {measured.eval_loss:.4f}"
    if criterion.name == "minImprovement":
        return f"{required}, and the held-out loss changed by {-criterion.found:+.2%}, {losses}"
    return (
        f"{required}, and the held-out loss is {criterion.found:.4f} ({measured.initial_eval_loss:.4f} before training)"
    )
