"""The plan of a sweep: cells, memory of each pod, and pods at a time."""

import importlib.util
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.memory.estimate import ActivationBytes
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.__main__ import main
from qlora_cli.local.plan_sweep import SweepPlan, make_sweep_plan, show_sweep_plan
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.model.memory.dry_run import StepSize
from tests.support.dry_runs import stand_in
from tests.support.manifests import merged
from tests.support.models.model_configs import LLAMA_3_8B

EXAMPLE = Path(__file__).parents[3] / "examples" / "sweep.yaml"
UNKNOWN = {"model_type": "starcoder2"}


@pytest.fixture(autouse=True)
def _dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def manifest(**changes: Any) -> dict[str, Any]:
    """The example with changes of its spec."""
    content: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text().replace("1e-4, 2e-4, 4e-4", "1.0e-4, 2.0e-4, 4.0e-4"))
    return merged(content, {"spec": changes})


def template(**changes: Any) -> dict[str, Any]:
    """Changes of the template's spec."""
    return {"spec": changes}


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def planned(folder: Path, config: dict[str, Any], **changes: Any) -> SweepPlan:
    document = QLoRASweepDocument.model_validate(manifest(**changes))
    return make_sweep_plan(document, written(folder, config), None)


def shown(plan: SweepPlan) -> str:
    output = io.StringIO()
    show_sweep_plan(plan, Console(file=output, width=200))
    return output.getvalue()


def row(text: str, cell: str) -> list[str]:
    """The words of the cell's line."""
    [line] = [line for line in text.splitlines() if cell in line]
    return [word for word in line.split() if word != "│"]


def invoked(folder: Path, command: str, content: dict[str, Any], *options: str) -> Result:
    """The command with the sweep as a file, for an 8B model."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    return CliRunner().invoke(main, [command, str(file), *options])


def test_each_cell_is_shown_with_what_it_changes_and_the_memory_that_it_needs(tmp_path: Path) -> None:
    text = shown(planned(tmp_path, LLAMA_3_8B, template=template(training={"gradientCheckpointing": True})))
    small, large = row(text, "support-rates-00"), row(text, "support-rates-03")
    assert small == ["support-rates-00", "rank=16", "learningRate=0.0001", small[3], "fits"]
    assert large == ["support-rates-03", "rank=64", "learningRate=0.0001", large[3], "fits"]
    assert 8 < float(small[3]) < float(large[3]) < 11
    assert "On 22 GiB" in text
    assert ["Cells", "6"] in [line.split() for line in text.splitlines()]
    assert ["Pods", "at", "a", "time", "1", "of", "6", "(spec.parallelism)"] in [
        line.split() for line in text.splitlines()
    ]


def test_the_cells_of_a_pod_are_estimated_together(tmp_path: Path) -> None:
    alone, together = planned(tmp_path, LLAMA_3_8B), planned(tmp_path, LLAMA_3_8B, cellsPerPod=4, parallelism=3)
    assert [len(pod.cells) for pod in together.pods] == [4, 2]
    memory = [pod.memory for pod in (*together.pods, *alone.pods)]
    first, second, *cells = memory
    assert first is not None
    assert second is not None
    assert first.adapters == sum(each.adapters for each in cells[:4] if each is not None)
    assert first.base_weights == second.base_weights
    text = shown(together)
    assert row(text, "support-rates-00")[3:] == [f"{first.expected / 2**30:.2f}", "fits"]
    assert row(text, "support-rates-03")[3:] == []
    assert row(text, "support-rates-04")[3:] == [f"{second.expected / 2**30:.2f}", "fits"]
    # No more at a time than there are.
    assert "Pods at a time  2 of 2 (spec.parallelism)" in text
    assert "GPUs at a time  2; when a pod has ended, each cell of it asks for one" in text


def test_settings_are_chosen_for_as_many_cells_as_a_pod_trains(tmp_path: Path) -> None:
    left_open = {"microBatchSize": None, "gradientAccumulationSteps": None, "maxSequenceLength": 512}
    plan = planned(tmp_path, LLAMA_3_8B, cellsPerPod=4, template=template(training=left_open))
    sizes = [[each.spec.training.micro_batch_size for each in pod.alone] for pod in plan.pods]
    assert sizes == [[2] * 4, [4] * 2], "of 8 with 512 tokens"


def test_a_pod_that_cannot_fit_is_marked_and_ends_the_plan_as_a_job_that_cannot_fit(tmp_path: Path) -> None:
    config = str(written(tmp_path, LLAMA_3_8B))
    content = manifest(cellsPerPod=4, template=template(resources={"gpuMemory": "12Gi"}))
    done = invoked(tmp_path, "plan", content, "--config", config)
    assert done.exit_code == ExitCode.DOES_NOT_FIT
    assert row(done.output, "support-rates-00")[-1] == "exceeds"
    assert row(done.output, "support-rates-04")[-1] == "tight"
    assert "1 of 2 pods cannot fit on a GPU of 12 GiB: lower spec.cellsPerPod," in done.output
    # Alone each of them fits.
    alone = invoked(tmp_path, "plan", manifest(), "--config", config, "--gpu-memory", "12Gi")
    assert alone.exit_code == ExitCode.DONE


def test_without_the_size_of_a_gpu_each_cell_has_the_smallest_on_which_it_fits(tmp_path: Path) -> None:
    grid = {"rank": None, "learningRate": None, "microBatchSize": [1, 64]}
    content = manifest(template=template(resources={}), grid={})
    content["spec"]["grid"] = {name: values for name, values in grid.items() if values}
    del content["spec"]["template"]["spec"]["resources"]
    text = shown(make_sweep_plan(QLoRASweepDocument.model_validate(content), written(tmp_path, LLAMA_3_8B), None))
    assert row(text, "support-rates-00")[-3:] == ["A10", "(22.5", "GiB)"]
    assert row(text, "support-rates-01")[-3] != "A10"
    assert "set spec.template.spec.resources.gpuMemory or --gpu-memory" in text


def test_gpus_at_a_time_are_those_of_all_pods(tmp_path: Path) -> None:
    text = shown(planned(tmp_path, LLAMA_3_8B, parallelism=3, template=template(resources={"gpus": 2})))
    assert "GPUs at a time  6, 2 for each pod" in text


FIXED = {"maxSteps": 400, "epochs": None}


@pytest.mark.parametrize(
    ("training", "grid", "shown_rungs"),
    [
        (FIXED, {}, "50, 100, 200 steps; the best 1/2 go on (spec.halving)"),
        (FIXED, {"maxSteps": [60, 150]}, "50, 100 steps; the best 1/2 go on (spec.halving)"),
        (FIXED, {"maxSteps": [30, 50]}, "none: no cell has more than spec.halving.minSteps (50) steps"),
        ({"epochs": 2}, {}, "3200, 6400 steps, as far as a cell has as many; the best 1/2 go on"),
    ],
    ids=["template", "cells", "too short", "epochs"],
)
def test_the_rungs_at_which_cells_are_compared_are_shown(
    training: dict[str, Any], grid: dict[str, Any], shown_rungs: str, tmp_path: Path
) -> None:
    training = {"evalEverySteps": 25, **training}
    changes = {"halving": {"minSteps": 50, "factor": 2}, "template": template(training=training), "grid": grid}
    assert shown_rungs in shown(planned(tmp_path, LLAMA_3_8B, **changes))
    assert "Rungs" not in shown(planned(tmp_path, LLAMA_3_8B))


def test_the_memory_is_unknown_without_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    plan = planned(tmp_path, LLAMA_3_8B)
    assert plan.exit_code is ExitCode.DONE
    text = shown(plan)
    assert row(text, "support-rates-00")[-2:] == ["–", "unknown"]
    assert text.count("the trainer is not installed") == 1


def measured(digest: str, rank: int) -> MeasuredMemory:
    step = MeasuredStep(
        sequences=2, sequence_tokens=2048, gradient_checkpointing=True, kept=2**20, loss=2**20, work=2**20
    )
    return MeasuredMemory(
        digest=digest,
        blocks=2,
        rank=rank,
        quantized_parameters=2**30,
        unquantized_bytes=2**20,
        adapter_parameters=rank * 2**20,
        pageable_parameters=0,
        whole_parameters=0,
        steps=(step,),
    )


@pytest.mark.parametrize(("cells_per_pod", "joint"), [(1, 0), (16, 2)])
def test_cells_that_need_the_same_memory_are_measured_once(tmp_path: Path, cells_per_pod: int, joint: int) -> None:
    ranks: list[int] = []
    passes_of: list[int] = []

    def measure(config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        ranks.append(spec.lora.rank)
        return measured(digest, spec.lora.rank)

    def measure_passes(
        config: Path, specs: Sequence[ResolvedSpec], passes: Sequence[tuple[int, ...]]
    ) -> tuple[ActivationBytes, ...]:
        passes_of.append(len(specs))
        return tuple(ActivationBytes(checkpoints=2**20, kept=0, layers=2**20, logits=0) for _ in passes)

    grid = {"rank": [16, 64], "alpha": [8, 16], "learningRate": [number * 1e-4 for number in range(1, 17)]}
    document = QLoRASweepDocument.model_validate(manifest(grid=grid, cellsPerPod=cells_per_pod))
    plan = make_sweep_plan(document, written(tmp_path, UNKNOWN), None, measure, measure_passes)
    assert sum(len(pod.cells) for pod in plan.pods) == 64
    assert ranks == [16, 64]
    assert passes_of == [16] * joint
    assert len({pod.cells[0].name for pod in plan.pods}) == len(plan.pods)


def test_a_model_with_one_row_a_sequence_says_so_once_and_takes_one_cell_a_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    text = shown(planned(tmp_path, {"model_type": "bamba"}, template=template(training={"microBatchSize": 1})))
    assert text.count("Remark on 6 of 6 cells: no packing") == 1
    done = invoked(
        tmp_path, "plan", manifest(cellsPerPod=2), "--config", str(written(tmp_path, {"model_type": "bamba"}))
    )
    assert done.exit_code == ExitCode.BAD_CONFIGURATION
    assert "spec.cellsPerPod is 2: models of type bamba cannot keep" in done.output
    assert "remove cellsPerPod" in done.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"template": {"spec": {"lora": {"ranks": 8}}}},
            ": spec.template.spec.lora.ranks: unknown field; did you mean rank?",
        ),
        (
            {"template": {"spec": {"lora": {"rank": 0}}}},
            ": spec.template.spec.lora.rank: found 0, must be greater than or equal to 1",
        ),
        ({"paralelism": 2}, ": spec.paralelism: unknown field; did you mean parallelism?"),
        ({"grid": {"learningRates": [1e-4]}}, ": spec.grid.learningRates: unknown field; did you mean learningRate?"),
        ({"grid": {"rank": [16, 16]}}, "cell support-rates-03 (rank=16 learningRate=0.0001) is a duplicate"),
        (
            {
                "grid": {
                    "rank": [16],
                    "learningRate": [1e-4],
                    "targetModules": [["q_proj", "k_proj"], ["k_proj", "q_proj"]],
                }
            },
            "targetModules=k_proj,q_proj learningRate=0.0001) is the same as cell support-rates-00 of spec.grid",
        ),
    ],
)
def test_an_invalid_sweep_is_rejected_with_the_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    done = invoked(tmp_path, "plan", manifest(**changes), "--config", str(written(tmp_path, LLAMA_3_8B)))
    assert done.exit_code == ExitCode.BAD_CONFIGURATION
    assert message in done.output
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize("cells_per_pod", [1, 4])
def test_a_config_that_is_no_json_object_is_rejected_in_one_sentence(tmp_path: Path, cells_per_pod: int) -> None:
    config = tmp_path / "config.json"
    for content in ("{", "[]"):
        config.write_text(content)
        done = invoked(tmp_path, "plan", manifest(cellsPerPod=cells_per_pod), "--config", str(config))
        assert done.exit_code == ExitCode.BAD_CONFIGURATION
        assert "config.json is not a JSON object" in done.output


def test_a_name_that_leaves_no_room_for_those_of_the_cells_is_rejected(tmp_path: Path) -> None:
    content = manifest(publish="best", template=template(output={"destination": "hf://acme/best"}))
    for length, problem in ((43, "metadata.name: "), (41, "at most 40 characters with publish: best")):
        content["metadata"]["name"] = "a" * length
        done = invoked(tmp_path, "plan", content)
        assert done.exit_code == ExitCode.BAD_CONFIGURATION
        assert problem in done.output


def test_one_file_is_planned_at_a_time(tmp_path: Path) -> None:
    assert invoked(tmp_path, "plan", manifest(), str(tmp_path / "sweep.yaml")).exit_code == 2


def test_rows_are_looked_for_where_the_template_says(tmp_path: Path) -> None:
    for command, options in (("data", ()), ("plan", ("--data",))):
        done = invoked(tmp_path, command, manifest(), *options)
        assert done.exit_code == ExitCode.BAD_CONFIGURATION
        assert "team-data" in done.output
        assert "unknown field" not in done.output


def test_without_pytorch_a_plan_loads_no_library_of_trainer_or_operator(tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = None
from qlora_cli.__main__ import main
main(["plan", {str(EXAMPLE)!r}, "--config", {str(written(tmp_path, LLAMA_3_8B))!r}], standalone_mode=False)
"""
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in loaded.stderr.splitlines()}
    assert "pydantic" in modules
    assert not modules & {"torch", "transformers", "numpy", "kopf", "kubernetes"}
