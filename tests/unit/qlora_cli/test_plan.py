"""The plan of a job with a dry run, and without the trainer."""

import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from qlora_api.contract import TIGHT_EXIT_CODE, ExitCode
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import LoraSpec
from qlora_cli.local.plan import make_plan, show_plan
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.memory.dry_run import measure_within_limits
from qlora_trainer.model.memory.job_memory import Measure
from tests.support.dry_runs import measure, stand_in
from tests.support.models.model_configs import SMALL_LLAMA
from tests.support.resolved import LORA, TRAINING

SPEC = QLoRAJobSpec.model_validate(
    {
        "model": {"source": "hf://acme/model"},
        "dataset": {"source": "hf://acme/rows"},
        "resources": {"gpuMemory": "24Gi"},
    }
)

DECIDED_SPEC = QLoRAJobSpec.model_validate(SPEC.dump() | {"lora": LORA, "training": TRAINING})


@pytest.fixture
def _no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def written(folder: Path, **config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_the_memory_of_unlisted_layers_is_unknown(tmp_path: Path) -> None:
    plan = make_plan("tiny", DECIDED_SPEC, written(tmp_path, model_type="starcoder2", hidden_size=3072), None)
    assert plan.exit_code is ExitCode.DONE
    output = io.StringIO()
    show_plan(plan, Console(file=output, width=400))
    assert output.getvalue().splitlines() == [
        "tiny: hf://acme/model, rank 64, 1 × 512 tokens",
        (
            "unknown: activations take a dry run; the trainer is not installed: "
            "run `pip install '.[cli,trainer]'` in a checkout of the repository."
        ),
    ]


def shown(spec: QLoRAJobSpec, config: Path, measure: Measure = measure_within_limits) -> str:
    output = io.StringIO()
    show_plan(make_plan("tiny", spec, config, None, measure), Console(file=output, width=400))
    return output.getvalue()


def rows(text: str) -> dict[str, str]:
    """The GiB of each component."""
    cells = [re.split(r" *[│┃] *", line.strip("│┃ ")) for line in text.splitlines() if "│" in line]
    return {name: size for name, size, *_ in cells}


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_a_plan_matches_the_dry_run(tmp_path: Path) -> None:
    config = written(tmp_path, **SMALL_LLAMA)
    for lora in ({}, {"useDora": True}, {"modulesToSave": ["lm_head"]}, {"layersToTransform": [1]}):
        spec = SPEC.model_copy(update={"lora": LoraSpec.model_validate(lora)})
        without, measured = shown(spec, config), rows(shown(spec, config, measure))
        assert "unknown: activations take a dry run; the trainer is not installed: run `pip install" in without
        counted = rows(without)
        assert float(counted.pop("Without activations")) < float(measured["Expected peak"])
        assert set(measured) - set(counted) == {
            "Expected peak",
            "Working set of the layers",
            "Logits and their gradient",
        }
        assert counted.items() <= measured.items()


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_weights_that_exceed_the_gpu_are_reported(tmp_path: Path) -> None:
    large = {**SMALL_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    config = written(tmp_path, **large)
    assert make_plan("large", SPEC, config, None).exit_code is ExitCode.DOES_NOT_FIT
    assert "exceeds: the run cannot fit on a GPU of 24 GiB with any activations: " in shown(SPEC, config)
    assert make_plan("large", SPEC, config, 80).exit_code is ExitCode.DONE


@pytest.mark.usefixtures("_no_trainer")
def test_without_the_trainer_an_impossible_size_is_still_rejected(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match="hidden_size is '4096'"):
        make_plan("tiny", SPEC, written(tmp_path, model_type="llama", hidden_size="4096"), None)


@pytest.fixture
def _dry_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.mark.usefixtures("_dry_runs")
def test_a_plan_of_a_job_that_continues_a_run_advises_no_other_settings(tmp_path: Path) -> None:
    large = {**SMALL_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    config, settings = written(tmp_path, **large), {"continues": "earlier", "training": {"microBatchSize": 4}}
    output = shown(SPEC.model_validate(SPEC.dump() | settings), config, measure)
    assert "exceeds: the run cannot fit on a GPU of 24 GiB" in output
    assert "Only a larger GPU is sure to fit: a job with spec.continues cannot change these settings." in output
    assert "What to change" not in output
    assert "What to change" in shown(SPEC, config, measure)


BAMBA = {"model_type": "bamba"}
MIXTURE = {"model_type": "qwen3_moe", "num_experts": 128}


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_reports_that_rows_are_not_packed(tmp_path: Path) -> None:
    assert "Remark: no packing: rows in one sequence would affect each other in this bamba model" in shown(
        DECIDED_SPEC, written(tmp_path, **BAMBA)
    )
    assert "Remark" not in shown(SPEC, written(tmp_path, **SMALL_LLAMA))


MERGED = {"merged": {"destination": "pvc://models/merged"}}
BASE = {"base": {"destination": "pvc://models/base"}}


@pytest.mark.parametrize("trainer", ["_no_trainer", "_dry_runs"])
@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (MIXTURE, {"output": MERGED}, r"spec\.output\.merged: the model \(model_type 'qwen3_moe'\) is a mixture"),
        (MIXTURE, {"output": BASE}, "no server reads experts as they are in its 4-bit base"),
        (BAMBA, {"training": {"objective": "dpo"}}, "compares two answers in one pass"),
        (BAMBA, {"training": {"microBatchSize": 4}}, r"set spec\.training\.microBatchSize to 1"),
    ],
)
def test_a_plan_rejects_a_model_as_prepare_does(
    tmp_path: Path,
    config: dict[str, object],
    settings: dict[str, object],
    reason: str,
    trainer: str,
    request: pytest.FixtureRequest,
) -> None:
    request.getfixturevalue(trainer)
    spec, file = QLoRAJobSpec.model_validate(SPEC.dump() | settings), written(tmp_path, **config)
    with pytest.raises(StepFailure, match=reason) as caught:
        make_plan("tiny", spec, file, None)
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION


@pytest.mark.usefixtures("_no_trainer")
def test_a_plan_makes_up_no_size_that_the_file_lacks(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SMALL_LLAMA.items() if name not in ("vocab_size", "intermediate_size")}
    config = written(tmp_path, **sizes)
    with pytest.raises(StepFailure, match="intermediate_size, vocab_size are missing in the model's config"):
        make_plan("tiny", SPEC, config, None)


@pytest.mark.usefixtures("_dry_runs")
def test_a_run_that_may_run_out_of_memory_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    large = {**SMALL_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    config = written(tmp_path, **large)
    codes = [make_plan("large", SPEC, config, gib).exit_code for gib in (24, 48, 80)]
    assert codes == [ExitCode.DOES_NOT_FIT, TIGHT_EXIT_CODE, ExitCode.DONE]


@pytest.mark.usefixtures("_dry_runs")
def test_a_plan_names_the_gpus_that_a_sharded_base_fits(tmp_path: Path) -> None:
    large = {**SMALL_LLAMA, "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}
    config = written(tmp_path, **large)
    alone = shown(SPEC, config)
    assert re.search(r"spec\.resources\.gpus: 1 → \d\n  spec\.training\.sharding: none → full", alone)
    assert "only a larger GPU" not in alone
    merged = shown(SPEC.model_validate(SPEC.dump() | {"output": MERGED}), config)
    assert "sharding" not in merged
    assert "only a larger GPU or a smaller model is sure to fit" in merged
    several = shown(SPEC.model_validate(SPEC.dump() | {"resources": {"gpus": 8, "gpuMemory": "24Gi"}}), config)
    assert "1. spec.training.sharding: none → full" in several
