"""`qlora-trainer selftest` compares a step of tiny models with a CPU in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import PreTrainedModel

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.__main__ import main
from qlora_trainer.core.context import Device
from qlora_trainer.model.base.load import load_base
from qlora_trainer.steps import selftest

TRIED = {
    "dense": ("32bit", "8bit"),
    "sliding window": ("32bit",),
    "heads of 512": ("32bit",),
    "linear attention": ("32bit",),
    "mixture of experts": ("32bit",),
    "attention sinks, experts in MXFP4": ("32bit",),
}


@pytest.fixture(autouse=True)
def unchanged_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of this process, which runs other tests."""
    monkeypatch.setattr("qlora_trainer.core.process.set_environment", lambda *_, **__: None)
    monkeypatch.setattr("logging.disable", lambda _: None)
    monkeypatch.setattr(selftest, "use_device", lambda *_: None)


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["selftest", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    return result


def test_a_machine_that_computes_right_passes() -> None:
    result = run("--device", "cpu")
    lines = [line.partition(":")[0] for line in result.output.splitlines() if line.startswith("passed")]
    assert lines == [f"passed  {kind}, paged_adamw_{bits}" for kind, tried in TRIED.items() for bits in tried]
    assert result.exit_code == 0


def only(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(selftest, "_KINDS", {kind: selftest._KINDS[kind]})


def test_a_machine_that_computes_attention_sinks_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_without_sinks(folder: Path, *arguments: Any, **options: Any) -> PreTrainedModel:
        model = load_base(folder, *arguments, **options)
        if options["compute_type"] == "bfloat16":
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("sinks"):
                        parameter.sub_(10)
        return model

    monkeypatch.setattr(selftest, "load_base", load_without_sinks)
    only(monkeypatch, "attention sinks, experts in MXFP4")
    assert "FAILED" in run("--device", "cpu").output


def test_a_machine_that_computes_otherwise_fails_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_otherwise(folder: Path, quantization: QuantizationSpec, device: Device, **options: Any) -> PreTrainedModel:
        model = load_base(folder, quantization, device, **options)
        if options["compute_type"] == "bfloat16":
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(1.5)
        return model

    monkeypatch.setattr(selftest, "load_base", load_otherwise)
    only(monkeypatch, "dense")
    result = run("--device", "cpu")
    assert result.exit_code == 1
    assert result.output.count("FAILED") == 2
    assert "A CPU in float32 has loss" in result.output


def test_a_machine_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("qlora_trainer.core.process.set_environment", lambda *_, **__: None)
    monkeypatch.setattr("logging.disable", lambda _: None)
    result = run()
    assert result.exit_code == 1
    assert "Error: no CUDA GPU is visible in this container" in result.output
