"""The plan of a model that is not in the table of families, with the trainer and without."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_cli.plan import make_plan, show_plan
from qlora_trainer.core.failures import StepFailure

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
            "install qlora-operator[cli,trainer]."
        ),
    ]


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_an_impossible_size_is_still_rejected(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="hidden_size is '4096'"):
        make_plan("tiny", SPEC, written(tmp_path, model_type="llama", hidden_size="4096"), None)
