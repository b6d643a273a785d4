"""Decides whether a trained adapter is good enough to be published."""

from collections.abc import Iterator

from qlora_api.artifact_status import GateCriterion, GateStatus
from qlora_api.contract import ExitCode
from qlora_api.spec.gate import GateSpec
from qlora_trainer.core.completion import Score, TrainRecord, score_settings
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
    score = _score(gate, trained, prepared)
    criteria = tuple(_criteria(gate, trained, score))
    return GateStatus(
        passed=all(criterion.passed for criterion in criteria),
        adapter_sha256=trained.adapter_sha256,
        base_sha256=trained.base_sha256 or None,
        criteria=criteria,
        eval_loss=trained.eval_loss,
        initial_eval_loss=trained.initial_eval_loss,
        eval_tokens=None if pairs else trained.eval_tokens,
        score=None if score is None else score.adapter,
        base_score=None if score is None else score.base,
        score_rows=None if score is None else score.rows,
        score_too_long_rows=None if score is None else score.too_long_rows,
    )


def _score(gate: GateSpec, trained: TrainRecord, prepared: str) -> Score | None:
    if gate.score is None:
        return None
    if trained.score is None or trained.score.settings != score_settings(gate.score, prepared):
        found = "no score" if trained.score is None else "a score by other settings"
        raise bad_configuration(
            f"spec.gate.score: training has measured {found}, and publish has no GPU to measure it: restore "
            "spec.gate.score as it was, or run the train step again with it"
        )
    if trained.score.adapter_sha256 != trained.adapter_sha256:
        raise unsafe_artifact(
            f"the score in records/train.json is of the adapter with sha256 {trained.score.adapter_sha256}, and "
            f"training has written {trained.adapter_sha256}: it is not published; create the job again"
        )
    return trained.score


def _criteria(gate: GateSpec, trained: TrainRecord, score: Score | None) -> Iterator[GateCriterion]:
    if gate.min_improvement is not None:
        before, after = _eval_losses(trained)
        # A loss of 0 before training can only be kept.
        found = (before - after) / before if before else -after
        yield _criterion("minImprovement", gate.min_improvement, found, passed=found >= gate.min_improvement)
    if gate.max_eval_loss is not None:
        _, loss = _eval_losses(trained)
        yield _criterion("maxEvalLoss", gate.max_eval_loss, loss, passed=loss <= gate.max_eval_loss)
    if gate.min_score is not None and score is not None:
        yield _criterion("minScore", gate.min_score, score.adapter, passed=score.adapter >= gate.min_score)


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
    reasons = "; ".join(_reason(gate, criterion) for criterion in gate.criteria if not criterion.passed)
    return StepFailure(
        ExitCode.GATE_FAILED,
        f"{reasons}. The adapter is not published: it stays in {folder}, and report/report.html describes it. Train on "
        "more or better data, or change the limits in spec.gate and set a new spec.retry.request to publish it as it "
        "is",
    )


def _reason(gate: GateStatus, criterion: GateCriterion) -> str:
    required = f"spec.gate.{criterion.name} is {criterion.required:g}"
    if criterion.name == "minScore":
        return (
            f"{required}, and {criterion.found:.4g} of the adapter's answers to {gate.score_rows} held-out rows passed "
            f"(of the base's {gate.base_score:.4g})"
        )
    losses = f"from {gate.initial_eval_loss:.4f} before training to {gate.eval_loss:.4f}"
    if criterion.name == "minImprovement":
        return f"{required}, and the held-out loss changed by {-criterion.found:+.2%}, {losses}"
    return f"{required}, and the held-out loss is {criterion.found:.4f} ({gate.initial_eval_loss:.4f} before training)"
