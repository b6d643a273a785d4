"""The API server alone admits good manifests and rejects bad ones with a reason."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from qlora_api.spec.job import QLoRAJobDocument
from tests.support.manifests import FULL, MINIMAL, MIXED, Manifest, with_value, without
from tests.support.rejected.inputs import MANIFESTS


def apply(plane: ControlPlane, manifest: Manifest, *, dry_run: bool = True) -> Manifest:
    flags = ["--dry-run=server"] if dry_run else []
    answer = plane.kubectl("apply", *flags, "--output=json", "--filename=-", input_text=json.dumps(manifest))
    applied: Manifest = json.loads(answer)
    return applied


PINNED = {"source": "hf://org/held-out", "revision": "v1", "config": "en", "split": "test", "sha256": "0" * 64}
EVALUATED = with_value(MINIMAL, "spec.dataset.eval", PINNED)
COMPARED = with_value(MINIMAL, "spec.training.objective", "dpo")
SMOOTHED = with_value(
    with_value(COMPARED, "spec.training.preference", {"beta": 0.2, "labelSmoothing": 0.1}),
    "spec.dataset",
    {"source": "hf://org/pairs", "format": "preference", "columns": {"chosen": "better", "rejected": "worse"}},
)
SCORE = {"check": "jsonSchema", "schema": '{"type": "object"}', "rows": 10, "maxNewTokens": 64}
SCORED = with_value(EVALUATED, "spec.gate", {"minScore": 0.8, "score": SCORE})

# No other rows are held out, and only the guard is in a bucket.
GUARD = {"name": "chat", "source": "s3://team-data/chat.jsonl", "maxLossIncrease": 0.1}
GUARDED = with_value(
    with_value(MINIMAL, "spec.gate", {"guards": [GUARD]}), "spec.dataset.secretRef", {"name": "bucket-keys"}
)

BATCHED = with_value(
    with_value(MINIMAL, "spec.training", {"batchSize": 12, "microBatchSize": 3, "learningRateMultiplier": 0.5}),
    "spec.resources.gpus",
    4,
)

CONVERTED = with_value(MINIMAL, "spec.output.gguf", {})


BY_ROWS = with_value(
    with_value(EVALUATED, "spec.gate", {"score": {"check": "regex"}}), "spec.dataset.columns", {"check": "expected"}
)


def mixed_by_rows(evaluation: Manifest, *checked: bool) -> Manifest:
    """A mix, of whose sources those bring checks that are `checked`."""
    sources = [
        {"source": f"pvc://data/{number}.jsonl", **({"columns": {"check": "expected"}} if brings else {})}
        for number, brings in enumerate(checked)
    ]
    return with_value(BY_ROWS, "spec.dataset", {"mix": sources, "eval": evaluation})


FRACTION, HELD_OUT = {"fraction": 0.1}, {"source": "pvc://data/held-out.jsonl"}


@pytest.mark.parametrize(
    "manifest",
    [MINIMAL, FULL, EVALUATED, SCORED, BY_ROWS, mixed_by_rows(FRACTION, True, True),
     mixed_by_rows(HELD_OUT, True, False), COMPARED, SMOOTHED, MIXED, GUARDED, BATCHED],
    ids=["minimal", "full", "evaluated", "scored", "by rows", "mixed by rows", "held out by rows", "dpo", "smoothed",
         "mixed", "guarded", "batched"],
)  # fmt: skip
def test_a_good_manifest_is_admitted_and_parses(plane: ControlPlane, manifest: Manifest) -> None:
    applied = apply(plane, manifest)
    document = QLoRAJobDocument.model_validate(
        {key: applied[key] for key in ("apiVersion", "kind", "metadata", "spec")}
    )
    assert document.spec == QLoRAJobDocument.model_validate(manifest).spec


def test_the_server_fills_in_the_defaults_of_the_models(plane: ControlPlane) -> None:
    assert apply(plane, MINIMAL)["spec"] == QLoRAJobDocument.model_validate(MINIMAL).spec.dump()


SHARDED = with_value(with_value(MINIMAL, "spec.training.sharding", "full"), "spec.resources.gpus", 2)
STARTS = {
    "minimal": MINIMAL,
    "mixed": MIXED,
    "evaluated": EVALUATED,
    "scored": SCORED,
    "guarded": GUARDED,
    "by rows": BY_ROWS,
    "dpo": COMPARED,
    "converted": CONVERTED,
    "sharded": SHARDED,
}


def changed(start: Manifest, changes: dict[str, Any]) -> Manifest:
    for path, value in changes.items():
        start = without(start, path) if value is None else with_value(start, path, value)
    return start


REJECTED = {name: (changed(STARTS[start], changes), message) for name, start, changes, message in MANIFESTS} | {
    "huge string": (
        with_value(MINIMAL, "spec.model.source", "hf://org/" + "a" * 100_000),
        "spec.model.source: Too long",
    ),
    "a mix of too many": (with_value(MIXED, "spec.dataset.mix", [{"source": "hf://a/b"}] * 17), "must have at most 16"),
    "long label key": (
        with_value(MINIMAL, "spec.scheduling.nodeSelector", {"k" * 400: "v"}),
        "a label key has at most 253 characters",
    ),
    "huge list": (
        with_value(MINIMAL, "spec.lora.targetModules", [f"m{number}" for number in range(1000)]),
        "spec.lora.targetModules: Too many",
    ),
}


@pytest.mark.parametrize(("manifest", "message"), REJECTED.values(), ids=REJECTED)
def test_a_bad_manifest_is_rejected_with_the_field_named(plane: ControlPlane, manifest: Manifest, message: str) -> None:
    with pytest.raises(ClusterError) as rejection:
        apply(plane, manifest)
    assert message in str(rejection.value)


# The server coerces nothing, pydantic some; both must reject these, so that `qlora run` and `kubectl apply` agree.
@pytest.mark.parametrize("manifest", [manifest for manifest, _ in REJECTED.values()], ids=REJECTED)
def test_the_models_reject_the_same_manifests_as_the_server(manifest: Manifest) -> None:
    with pytest.raises(ValidationError):
        QLoRAJobDocument.model_validate(manifest)


CHANGES = {
    "model": with_value(FULL, "spec.model.revision", "v2.0"),
    "dataset": with_value(FULL, "spec.dataset.maxRows", 1001),
    "quantization": with_value(FULL, "spec.quantization.type", "fp4"),
    "lora": with_value(FULL, "spec.lora.rank", 8),
    "training": with_value(FULL, "spec.training.seed", 8),
    "training removed": without(FULL, "spec.training"),
    "output": without(without(FULL, "spec.workspace.persistentVolumeClaimRetentionPolicy"), "spec.output"),
    "workspace": with_value(FULL, "spec.workspace.size", "200Gi"),
    "resources": without(FULL, "spec.resources.gpuMemory"),
    "scheduling": with_value(FULL, "spec.scheduling.profileName", "small"),
    "cpu": with_value(FULL, "spec.resources.cpu", "3"),
    "nodes": with_value(FULL, "spec.resources.nodes", 3),
    "queue": with_value(FULL, "spec.scheduling.queueName", "gpus"),
    "another run to continue": with_value(FULL, "spec.continues", "other"),
    "no run to continue": without(FULL, "spec.continues"),
    "controller": with_value(FULL, "spec.managedBy", "example.org/controller"),
    "optional field added": with_value(FULL, "spec.dataset.columns.system", "role"),
}


@pytest.fixture(scope="module")
def created(plane: ControlPlane) -> None:
    apply(plane, FULL, dry_run=False)


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize("manifest", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_created_job_is_rejected_with_a_remedy(plane: ControlPlane, manifest: Manifest) -> None:
    with pytest.raises(ClusterError, match=r"spec\.[\w.]+ cannot be changed once the job exists: delete the QLoRAJob"):
        apply(plane, manifest)


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize(
    "manifest",
    [
        with_value(FULL, "spec.suspend", False),
        with_value(FULL, "spec.cancel", True),
        with_value(FULL, "spec.cancel", False),
        with_value(FULL, "spec.activeDeadlineSeconds", 60),
        without(FULL, "spec.activeDeadlineSeconds"),
        with_value(FULL, "spec.budget.gpuHours", 40),
        without(FULL, "spec.budget"),
        with_value(FULL, "spec.cleanupAfterSeconds", 60),
        without(FULL, "spec.ttlSecondsAfterFinished"),
        with_value(FULL, "spec.workspace.persistentVolumeClaimRetentionPolicy.whenFinished", "Delete"),
        without(FULL, "spec.workspace.persistentVolumeClaimRetentionPolicy"),
        with_value(FULL, "spec.progressDeadlineSeconds", 60),
        with_value(FULL, "spec.retry.request", "a"),
        with_value(FULL, "spec.retry.maxFailures", 2),
        with_value(FULL, "spec.resources.memory", "99Gi"),
        with_value(FULL, "spec.gate", {"minImprovement": 0.05}),
        without(FULL, "spec.gate"),
        without(FULL, "spec.retry"),
        with_value(FULL, "metadata.labels", {"team": "a"}),
    ],
    ids=[
        "suspend",
        "cancel",
        "no cancel",
        "deadline",
        "deadline removed",
        "budget",
        "budget removed",
        "cleanup",
        "ttl removed",
        "claim policy",
        "claim policy removed",
        "progress deadline",
        "request",
        "retries",
        "memory",
        "gate",
        "gate removed",
        "retry removed",
        "labels",
    ],
)
def test_mutable_fields_can_be_updated(plane: ControlPlane, manifest: Manifest) -> None:
    changed = apply(plane, manifest)
    for field in (
        "suspend",
        "cancel",
        "budget",
        "activeDeadlineSeconds",
        "cleanupAfterSeconds",
        "ttlSecondsAfterFinished",
        "progressDeadlineSeconds",
        "gate",
        "workspace",
    ):
        assert changed["spec"].get(field) == manifest["spec"].get(field)
    assert (manifest["spec"].get("retry") or {}).items() <= changed["spec"]["retry"].items()
    assert changed["spec"]["resources"]["memory"] == manifest["spec"]["resources"]["memory"]


def test_a_cancellation_cannot_be_taken_back(plane: ControlPlane) -> None:
    canceled = with_value(with_value(FULL, "metadata.name", "canceled"), "spec.cancel", True)
    apply(plane, canceled, dry_run=False)
    for manifest in (with_value(canceled, "spec.cancel", False), without(canceled, "spec.cancel")):
        with pytest.raises(ClusterError, match=r"spec\.cancel cannot be taken back: delete the QLoRAJob"):
            apply(plane, manifest)
    assert apply(plane, with_value(canceled, "spec.suspend", False))["spec"]["cancel"]
    plane.kubectl("delete", "qlorajob", "canceled")


def test_the_limit_of_a_score_may_change_and_its_definition_may_not(plane: ControlPlane) -> None:
    scored = with_value(with_value(SCORED, "metadata.name", "scored"), "spec.model.source", "hf://org/other")
    apply(plane, scored, dry_run=False)
    assert apply(plane, with_value(scored, "spec.gate.minScore", 0.5))["spec"]["gate"]["minScore"] == 0.5
    for manifest in (with_value(scored, "spec.gate.score.rows", 20), without(scored, "spec.gate")):
        with pytest.raises(ClusterError, match=r"spec\.gate\.score cannot be changed once the job exists, as training"):
            apply(plane, manifest)


def test_the_limits_of_a_guard_may_change_and_its_rows_may_not(plane: ControlPlane) -> None:
    guarded = with_value(with_value(GUARDED, "metadata.name", "guarded"), "spec.model.source", "hf://org/other")
    apply(plane, guarded, dry_run=False)
    mild = with_value(guarded, "spec.gate.guards", [GUARD | {"maxLossIncrease": 0.5}])
    assert apply(plane, mild)["spec"]["gate"]["guards"][0]["maxLossIncrease"] == 0.5
    for manifest, message in (
        (
            with_value(guarded, "spec.gate.guards", [GUARD | {"source": "s3://team-data/b.jsonl"}]),
            r"\.source cannot be",
        ),
        (with_value(guarded, "spec.gate.guards", [GUARD, GUARD | {"name": "code"}]), "only limits can be changed"),
        (with_value(guarded, "spec.gate", {"guards": [GUARD | {"name": "code"}]}), "only limits can be changed"),
        (without(without(guarded, "spec.dataset.secretRef"), "spec.gate"), "only limits can be changed"),
    ):
        with pytest.raises(ClusterError, match=message):
            apply(plane, manifest)


def test_the_limits_of_a_benchmark_may_change_and_its_task_may_not(plane: ControlPlane) -> None:
    task = {"task": "arc_easy", "rows": 100}
    other = with_value(with_value(MINIMAL, "metadata.name", "benchmarked"), "spec.model.source", "hf://org/other")
    job = with_value(other, "spec.gate", {"benchmarks": [task]})
    apply(plane, job, dry_run=False)
    strict = apply(plane, with_value(job, "spec.gate.benchmarks", [task | {"maxDrop": 0.02, "minScore": 0.5}]))
    assert strict["spec"]["gate"]["benchmarks"][0]["maxDrop"] == 0.02
    for manifest, message in (
        (with_value(job, "spec.gate.benchmarks", [task | {"rows": 50}]), r"\.rows cannot be"),
        (with_value(job, "spec.gate.benchmarks", [task | {"metric": "acc_norm"}]), r"\.metric cannot be"),
        (with_value(job, "spec.gate.benchmarks", [task, {"task": "gsm8k"}]), "only limits can be changed"),
        (with_value(job, "spec.gate.benchmarks", [{"task": "gsm8k"}]), "only limits can be changed"),
        (without(job, "spec.gate"), "only limits can be changed"),
    ):
        with pytest.raises(ClusterError, match=message):
            apply(plane, manifest)


@pytest.mark.usefixtures("created")
def test_a_job_that_no_operator_has_reconciled_reads_as_in_progress(plane: ControlPlane) -> None:
    job = plane.kubectl.get("qj", "full")
    assert job["status"]["observedGeneration"] == -1


@pytest.mark.usefixtures("created")
def test_the_server_keeps_the_status_of_the_base_and_its_cache(plane: ControlPlane) -> None:
    workspace = {"claimName": "c", "path": "w", "retentionPolicy": {"whenFinished": "Delete"}}
    base = {"origin": "cache", "bytesFetched": 17, "seconds": 3, "message": "the cache was damaged"}
    for field, value in (("base", base), ("workspace", workspace)):
        patch = json.dumps({"status": {field: value}})
        flags = ("--subresource=status", "--type=merge", "--dry-run=server", "--output=json")
        patched = json.loads(plane.kubectl("patch", "qlorajob", "full", *flags, f"--patch={patch}"))
        assert patched["status"][field] == value
    wrong = json.dumps({"status": {"base": base | {"origin": "elsewhere"}}})
    with pytest.raises(ClusterError, match=r"status\.base\.origin: Unsupported value"):
        plane.kubectl("patch", "qlorajob", "full", "--subresource=status", "--type=merge", f"--patch={wrong}")


@pytest.mark.usefixtures("created")
def test_jobs_can_be_selected_by_model(plane: ControlPlane) -> None:
    found = plane.kubectl.get("qlorajobs", "--field-selector=spec.model.source=hf://org/model")
    assert [item["metadata"]["name"] for item in found["items"]] == ["full"]


def test_kubectl_explain_reads_like_documentation(plane: ControlPlane) -> None:
    section = plane.kubectl("explain", "qlorajob.spec.training")
    assert "gradientAccumulationSteps\t<integer>" in section
    assert "Micro batches in one optimizer step. Costs no memory. Automatic: " in section
    assert "Automatic: 3e-4 × (4096 / width)^1.1" in plane.kubectl("explain", "qlorajob.spec.training.learningRate")


def test_kubectl_explain_has_the_defaults_and_no_line_breaks_of_the_source(plane: ControlPlane) -> None:
    assert "Default: 0.3." in plane.kubectl("explain", "qlorajob.spec.training.maxGradNorm")
    assert "Default" not in plane.kubectl("explain", "qlorajob.spec.training.learningRate")
    described = plane.kubectl("explain", "qlorajob.status.conditions").partition("FIELDS:")[0]
    paragraph = described.partition("Types: ")[2].strip()
    assert " ".join(paragraph.split()).endswith("Stalled (for tools that wait), CleanedUp.")
    assert len(paragraph.splitlines()) == 3, paragraph
