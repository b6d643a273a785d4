"""The plan of a model that is not in the table of families, with the trainer and without."""

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import LoraSpec
from qlora_cli.local.plan import make_plan, show_plan
from qlora_trainer.core.failures import StepFailure
from tests.support.model_configs import SMALL_LLAMA

SPEC = QLoRAJobSpec.model_validate(
    {
        "model": {"source": "hf://acme/model"},
        "dataset": {"source": "hf://acme/rows"},
        "resources": {"gpuMemory": 24},
    }
)


@pytest.fixture
def _no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def written(folder: Path, **config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_the_memory_of_such_a_model_is_unknown(tmp_path: Path) -> None:
    plan = make_plan("tiny", SPEC, written(tmp_path, model_type="starcoder2", hidden_size=3072), None)
    assert plan.exit_code is ExitCode.DONE
    output = io.StringIO()
    show_plan(plan, Console(file=output, width=400))
    assert output.getvalue().splitlines() == [
        "tiny: hf://acme/model, rank 64, 1 × 512 tokens",
        (
            "unknown: the table of model families does not have this model; the trainer is not installed: "
            "run `pip install '.[cli,trainer]'` in a checkout of the repository."
        ),
    ]


def shown(spec: QLoRAJobSpec, config: Path) -> str:
    output = io.StringIO()
    show_plan(make_plan("tiny", spec, config, None), Console(file=output, width=400))
    return output.getvalue()


@pytest.mark.usefixtures("_no_trainer")
@pytest.mark.parametrize("lora", [{"useDora": True}, {"modulesToSave": ["lm_head"]}, {"layersToTransform": [1]}])
def test_without_the_trainer_a_plan_says_for_which_settings_it_is_rough(tmp_path: Path, lora: dict[str, Any]) -> None:
    config = written(tmp_path, **SMALL_LLAMA)
    rough = SPEC.model_copy(update={"lora": LoraSpec.model_validate(lora)})
    assert "This is rough" in shown(rough, config)
    assert "run `pip install '.[cli,trainer]'` in a checkout" in shown(rough, config)
    assert "rough" not in shown(SPEC, config)


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_an_impossible_size_is_still_rejected(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="hidden_size is '4096'"):
        make_plan("tiny", SPEC, written(tmp_path, model_type="llama", hidden_size="4096"), None)


BAMBA = {"model_type": "bamba"}


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_of_a_job_that_continues_a_run_advises_no_other_settings(tmp_path: Path) -> None:
    large = {**SMALL_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    config, settings = written(tmp_path, **large), {"continues": "earlier", "training": {"microBatchSize": 4}}
    output = shown(SPEC.model_validate(SPEC.dump() | settings), config)
    assert "exceeds: the run cannot fit on a GPU of 24 GiB" in output
    assert "Only a larger GPU is sure to fit: a job with spec.continues cannot change these settings." in output
    assert "What to change" not in output
    assert "What to change" in shown(SPEC, config)


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_says_what_one_row_a_sequence_costs(tmp_path: Path) -> None:
    text = shown(SPEC, written(tmp_path, **BAMBA))
    assert "One row a sequence: packing is off, because models of type bamba cannot keep packed rows apart." in text
    assert "A step has 16 rows (training.gradientAccumulationSteps) and at most 8192 tokens" in text
    assert "One row" not in shown(SPEC, written(tmp_path, **SMALL_LLAMA))


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_says_that_a_model_with_one_row_a_sequence_compares_no_answers(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"objective": "dpo"})})
    assert (
        "models of type bamba cannot keep the rows of a batch apart, and training.objective compares two answers in "
        "one pass: set objective to supervised"
    ) in shown(spec, written(tmp_path, **BAMBA))


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_says_which_micro_batch_a_model_with_one_row_a_sequence_takes(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"micro_batch_size": 4})})
    assert (
        "models of type bamba cannot keep the rows of a batch apart: set training.microBatchSize to 1, and "
        "training.gradientAccumulationSteps to 64."
    ) in shown(spec, written(tmp_path, **BAMBA))
