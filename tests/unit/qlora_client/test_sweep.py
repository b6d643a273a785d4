"""A program's view of its sweeps: their cells, waits, comparisons and errors."""

from typing import Any

import pytest

from qlora_api.schema import replace
from qlora_api.spec.dataset import DatasetSpec, EvalSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_client import Comparison
from qlora_client.kube.resources import JOBS, Resource
from qlora_client.manifests import sweep_manifest
from qlora_client.sweep import Sweep
from qlora_client.waiting import Clock

SPEC = QLoRAJobSpec(
    model=BaseModelSpec(source="hf://org/model"),
    dataset=DatasetSpec(source="hf://org/rows", eval=EvalSpec(fraction=0.1)),
)


class Stored:
    """A cluster with the sweep `rates`, which is in each of these phases at a read, and with jobs."""

    def __init__(self, *phases: str, jobs: tuple[str, ...] = ()) -> None:
        self.phases = iter(phases)
        self.jobs = jobs

    def get(self, resource: Resource, name: str) -> dict[str, Any]:
        assert (resource.plural, name) == ("qlorasweeps", "rates")
        phase = next(self.phases)
        condition = {
            "type": "Failed" if phase == "Failed" else "Succeeded",
            "status": "True",
            "reason": phase,
            "message": "no cell has succeeded",
            "lastTransitionTime": "2026-01-02T03:04:05Z",
        }
        body = sweep_manifest("rates", SPEC, {"rank": [8, 16]})
        body["metadata"] |= {"namespace": "team", "uid": "1", "creationTimestamp": "2026-01-02T03:04:05Z"}
        return body | {"status": {"phase": phase, "conditions": [condition]}}

    def find(self, resource: Resource, *, selector: str) -> list[dict[str, Any]]:
        assert (resource, selector) == (JOBS, "qlora.dev/sweep=rates")
        return [{"metadata": {"name": name}} for name in self.jobs]


def sweep(cluster: Stored) -> Sweep:
    seconds = [0.0]

    def sleep(wanted: float) -> None:
        seconds[0] += wanted

    def compare(*names: str) -> Comparison:
        return Comparison(names, (), (), {})

    clock = Clock(sleep, lambda: seconds[0])
    return Sweep("rates", cluster, clock, compare)  # type: ignore[arg-type]


def test_each_combination_of_the_values_is_a_cell_of_the_set_fields() -> None:
    body = sweep_manifest("rates", SPEC, {"learning_rate": [1e-4, 2e-4], "rank": (16, 64)}, publish="all")
    assert body["metadata"] == {"name": "rates"}
    assert body["spec"] == {
        "template": {
            "spec": {
                "model": {"source": "hf://org/model"},
                "dataset": {"source": "hf://org/rows", "eval": {"fraction": 0.1}},
            }
        },
        "grid": {"rank": [16, 64], "learningRate": [1e-4, 2e-4]},
        "publish": "all",
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnig_rate": [1e-4]}, "learnig_rate: unknown field; did you mean learning_rate?"),
        ({"learning_rate": [1e-4, 2]}, "learning_rate.1: found 2, must be less than or equal to 1"),
        ({"rank": 16}, "rank: found 16, must be a list"),
        ({}, "name at least one field with its values"),
        ({"rank": [16, 16]}, "cell rates-01 (rank=16) is a duplicate: a list of the grid repeats a value"),
        ({"epochs": [1], "max_steps": [5]}, "epochs and maxSteps both set the length of a run: name one of them"),
        ({"seed": [1, 2]}, "spec: training.seed chooses the rows of dataset.eval.fraction"),
    ],
)
def test_a_sweep_that_cannot_be_created_is_named_with_its_remedy(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as rejected:
        sweep_manifest("rates", SPEC, values)
    assert str(rejected.value).startswith(message)
    assert "nput" not in str(rejected.value)


def test_a_template_without_held_out_rows_and_a_long_name_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"set spec\.template\.spec\.dataset\.eval"):
        sweep_manifest("rates", replace(SPEC, dataset=DatasetSpec(source="hf://org/rows")), {"rank": [8]})
    with pytest.raises(ValueError, match=r"^metadata\.name: found .*, must have at most 42 characters"):
        sweep_manifest("r" * 43, SPEC, {"rank": [8]})


def test_waiting_follows_the_sweep_to_its_end() -> None:
    seen: list[str] = []
    found = sweep(Stored("Pending", "Running", "Succeeded")).wait(callbacks=[lambda each: seen.append(each.phase)])
    assert (found.phase, seen) == ("Succeeded", ["Pending", "Running", "Succeeded"])
    with pytest.raises(RuntimeError, match="rates has ended as Failed: no cell has succeeded"):
        sweep(Stored("Running", "Failed")).wait()
    with pytest.raises(TimeoutError, match="rates has come to Running in 10 s, and not to Succeeded"):
        sweep(Stored(*["Running"] * 9)).wait(timeout=10)


def test_the_cells_are_compared_in_their_order_without_the_job_that_publishes() -> None:
    assert sweep(Stored(jobs=("rates-01", "rates-best", "rates-00"))).compare().names == ("rates-00", "rates-01")
    with pytest.raises(RuntimeError, match="rates has no cells yet: it is Pending"):
        sweep(Stored("Pending")).compare()
