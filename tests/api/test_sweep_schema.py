"""The API server alone admits good sweeps and rejects bad ones with a reason."""

import json

import pytest

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from qlora_api.sweep.spec import QLoRASweepSpec, cells
from tests.support.manifests import Manifest, with_value, without
from tests.support.sweeps import FULL_SWEEP, SWEEP, TASKS


def apply(plane: ControlPlane, manifest: Manifest, *, dry_run: bool = True) -> Manifest:
    flags = ["--dry-run=server"] if dry_run else []
    answer = plane.kubectl("apply", *flags, "--output=json", "--filename=-", input_text=json.dumps(manifest))
    applied: Manifest = json.loads(answer)
    return applied


BEST = with_value(
    with_value(SWEEP, "spec.template.spec.output", {"destination": "oci://example.org/team/adapter:v1", "merged": {}}),
    "spec.publish",
    "best",
)
TOGETHER = with_value(with_value(SWEEP, "spec.cellsPerPod", 2), "spec.grid", {"rank": [8, 16], "dropout": [0.0]})
FURTHER_TRAINED = with_value(
    with_value(SWEEP, "spec.template.spec.lora", {"from": {"source": "pvc://data/adapter"}}),
    "spec.grid",
    {"learningRate": [1e-4, 2e-4], "dropout": [0.0, 0.1]},
)


@pytest.mark.parametrize(
    "manifest",
    [SWEEP, FULL_SWEEP, FURTHER_TRAINED, BEST, TOGETHER, TASKS],
    ids=["grid", "every field", "of an earlier adapter", "the best is published", "several in a pod", "different data"],
)
def test_a_good_sweep_is_admitted_with_the_defaults_of_the_models(plane: ControlPlane, manifest: Manifest) -> None:
    assert apply(plane, manifest)["spec"] == QLoRASweepSpec.model_validate(manifest["spec"]).dump()


def test_a_grid_of_as_many_cells_as_there_may_be_is_admitted(plane: ControlPlane) -> None:
    grid = {"rank": [8, 16, 32, 64], "alpha": [8, 16, 32, 64], "warmupSteps": [0, 1, 2, 3]}
    assert apply(plane, with_value(SWEEP, "spec.grid", grid))["spec"]["grid"] == grid


TEMPLATE = "spec.template.spec"
HALVED = with_value(
    with_value(SWEEP, f"{TEMPLATE}.training", {"maxSteps": 100, "evalEverySteps": 10}),
    "spec.halving",
    {"minSteps": 20, "factor": 2},
)
FURTHER = with_value(SWEEP, f"{TEMPLATE}.lora", {"from": {"source": "pvc://data/adapter"}})
ONE_PLACE = {"destination": "hf://org/adapter"}
FAR_TOO_LARGE = {
    "rank": list(range(1, 65)),
    "alpha": list(range(1, 65)),
    "dropout": [number / 100 for number in range(64)],
    "targetModules": [[f"layer{number}"] for number in range(64)],
    "learningRate": [number / 1000 for number in range(1, 65)],
    "warmupSteps": list(range(64)),
    "weightDecay": [number / 100 for number in range(64)],
    "maxGradNorm": list(range(1, 65)),
    "microBatchSize": list(range(1, 65)),
    "gradientAccumulationSteps": list(range(1, 65)),
    "maxSteps": list(range(1, 65)),
    "seed": list(range(64)),
}
REJECTED = {
    "no rows to compare by": (without(SWEEP, f"{TEMPLATE}.dataset.eval"), "compares the losses on held-out rows"),
    "rows to compare by, but none": (
        with_value(SWEEP, f"{TEMPLATE}.dataset.eval", {"fraction": 0}),
        "compares the losses on held-out rows",
    ),
    "neither grid nor cells": (without(SWEEP, "spec.grid"), "set exactly one of grid and cells"),
    "grid and cells": (with_value(SWEEP, "spec.cells", [{"rank": 8}]), "set exactly one of grid and cells"),
    "an empty grid": (with_value(SWEEP, "spec.grid", {}), "name at least one field with its values"),
    "a list without values": (with_value(SWEEP, "spec.grid.rank", []), "should have at least 1 items"),
    "a value twice": (with_value(SWEEP, "spec.grid.rank", [8, 8]), "Duplicate value"),
    "too many cells": (
        with_value(SWEEP, "spec.grid", {"rank": list(range(1, 14)), "alpha": [1, 2, 3, 4, 5]}),
        "more than 64 cells",
    ),
    "far too many cells": (with_value(SWEEP, "spec.grid", FAR_TOO_LARGE), "more than 64 cells"),
    "too many cells in a list": (with_value(SWEEP, "spec.cells", [{"rank": 1}] * 65), "must have at most 64 items"),
    "a rank out of bounds": (with_value(SWEEP, "spec.grid.rank", [8, 1025]), "less than or equal to 1024"),
    "epochs and maxSteps": (
        with_value(SWEEP, "spec.grid", {"epochs": [1], "maxSteps": [10]}),
        "epochs and maxSteps both set the length",
    ),
    "epochs and maxSteps of a cell": (
        with_value(without(SWEEP, "spec.grid"), "spec.cells", [{"epochs": 1, "maxSteps": 10}]),
        "epochs and maxSteps both set the length",
    ),
    "a field that cells have in common": (
        with_value(SWEEP, "spec.grid.maxSequenceLength", [128, 256]),
        'unknown field "spec.grid.maxSequenceLength"',
    ),
    "sources in a cell": (
        with_value(without(SWEEP, "spec.grid"), "spec.cells", [{"model": {"source": "hf://other/model"}}]),
        'unknown field "spec.cells[0].model"',
    ),
    "seeds that choose the held-out rows": (
        with_value(with_value(SWEEP, f"{TEMPLATE}.dataset.eval", {"fraction": 0.1}), "spec.grid", {"seed": [0, 1]}),
        "cells with different seeds could not be compared",
    ),
    "scores that nobody computes": (with_value(SWEEP, "spec.best", "score"), "set that, or leave best out"),
    "rungs without evaluations": (
        with_value(SWEEP, "spec.halving", {"minSteps": 20}),
        "set spec.template.spec.training.evalEverySteps",
    ),
    "rungs between evaluations": (
        with_value(HALVED, "spec.halving.minSteps", 25),
        "minSteps, or to a divisor of it",
    ),
    "a first rung at the end": (with_value(HALVED, "spec.halving.minSteps", 100), "no cell would be stopped"),
    "a factor of 1": (with_value(HALVED, "spec.halving.factor", 1), "greater than or equal to 2"),
    "another rank than the earlier adapter": (FURTHER, "rank, alpha and targetModules it must have"),
    "other layers than the earlier adapter": (
        with_value(without(FURTHER, "spec.grid"), "spec.cells", [{}, {"targetModules": ["q_proj"]}]),
        "rank, alpha and targetModules it must have",
    ),
    "the best adapter to no place": (with_value(SWEEP, "spec.publish", "best"), "which names no place"),
    "a name too long for the best": (
        with_value(with_value(SWEEP, "spec.publish", "best"), "metadata.name", "a" * 41),
        "at most 40 characters with publish: best",
    ),
    "DoRA for several in a pod": (
        with_value(with_value(SWEEP, f"{TEMPLATE}.lora", {"useDora": True}), "spec.cellsPerPod", 2),
        "lora.useDora is not supported with cellsPerPod, which trains several jobs in one process",
    ),
    "dropout of one of several in a pod": (
        with_value(with_value(SWEEP, "spec.grid.dropout", [0, 0.1]), "spec.cellsPerPod", 2),
        "remove dropout above 0 from grid and cells",
    ),
    "several in a pod that are stopped one by one": (
        with_value(HALVED, "spec.cellsPerPod", 2),
        "halving stops single cells, and with cellsPerPod",
    ),
    "more in a pod than can be": (with_value(SWEEP, "spec.cellsPerPod", 17), "less than or equal to 16"),
    "other data in a cell that is compared": (
        without(TASKS, "spec.select"),
        "compares cells by the loss on the same rows",
    ),
    "stopped cells of which none is compared": (
        with_value(HALVED, "spec.select", "all"),
        "select: all compares no cells: remove halving, best: score and publish: best",
    ),
    "the best of cells that are not compared": (with_value(BEST, "spec.select", "all"), "compares no cells"),
    "two cells that publish to one place": (
        with_value(TASKS, "spec.cells", [{"rank": 8, "output": ONE_PLACE}, {"rank": 16, "output": ONE_PLACE}]),
        "two cells have the same output.destination",
    ),
    "a suspended template": (with_value(SWEEP, f"{TEMPLATE}.suspend", True), "suspend the sweep"),
    "cells deleted before their sweep": (
        with_value(SWEEP, f"{TEMPLATE}.ttlSecondsAfterFinished", 60),
        "set ttlSecondsAfterFinished of the sweep and not of its template",
    ),
    "a controller of the cells": (
        with_value(SWEEP, f"{TEMPLATE}.managedBy", "qlora.dev/operator"),
        "set managedBy of the sweep and not of its template",
    ),
    "a merged model deleted with the claim": (
        with_value(TASKS, f"{TEMPLATE}.workspace.persistentVolumeClaimRetentionPolicy.whenFinished", "Delete"),
        "set a destination in each output of cells",
    ),
    "one repository for all adapters": (
        with_value(SWEEP, f"{TEMPLATE}.output", {"destination": "hf://org/adapter"}),
        "a folder of its own below output.destination",
    ),
    "a merged model for each cell": (
        with_value(SWEEP, f"{TEMPLATE}.output", {"merged": {}}),
        "would merge the adapter of every cell",
    ),
    "the run of another job": (with_value(SWEEP, f"{TEMPLATE}.continues", "tune"), "continues takes up one run"),
    "what a job does not admit": (
        with_value(SWEEP, f"{TEMPLATE}.training", {"epochs": 1, "maxSteps": 10}),
        "set only one of epochs and maxSteps",
    ),
    "no parallelism": (with_value(SWEEP, "spec.parallelism", 0), "greater than or equal to 1"),
    "a long name": (with_value(SWEEP, "metadata.name", "a" * 43), "at most 42 characters"),
    "a name with a dot": (with_value(SWEEP, "metadata.name", "a.b"), "must be one DNS label"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_bad_sweep_is_rejected_with_a_reason(plane: ControlPlane, case: str) -> None:
    manifest, message = REJECTED[case]
    with pytest.raises(ClusterError) as caught:
        apply(plane, manifest)
    assert message in str(caught.value)
    if "name" not in case and "unknown field" not in message:
        with pytest.raises(ValueError):  # noqa: PT011 - of the spec, or of the cell that is a duplicate
            cells("rates", QLoRASweepSpec.model_validate(manifest["spec"]), "claim")


CHANGES = {
    "the template": (f"{TEMPLATE}.training", {"learningRate": 1e-3}),
    "a mutable field of a job": (f"{TEMPLATE}.retry", {"maxFailures": 1}),
    "the grid": ("spec.grid.rank", [8, 16, 32]),
    "halving": ("spec.halving", {"minSteps": 10}),
    "the controller": ("spec.managedBy", "example.org/controller"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_decides_the_cells_cannot_be_changed(plane: ControlPlane, case: str) -> None:
    stored = with_value(HALVED, "metadata.name", f"fixed-{list(CHANGES).index(case)}")
    apply(plane, stored, dry_run=False)
    path, value = CHANGES[case]
    with pytest.raises(ClusterError, match="cannot be changed once the sweep exists"):
        apply(plane, with_value(stored, path, value))


def test_parallelism_suspension_and_the_time_to_live_can_be_changed(plane: ControlPlane) -> None:
    stored = with_value(SWEEP, "metadata.name", "mutable")
    apply(plane, stored, dry_run=False)
    changed = with_value(with_value(stored, "spec.parallelism", 3), "spec.suspend", True)
    assert apply(plane, changed)["spec"]["parallelism"] == 3
    for seconds in (0, 60):
        assert apply(plane, with_value(stored, "spec.ttlSecondsAfterFinished", seconds))["spec"] != stored["spec"]
