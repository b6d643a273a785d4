"""A model that is written in 16 bit has the weights of training, also those that a family has in 32 bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.architecture.dequantized_model import (
    DequantizedBase,
    load_written,
    model_without_weights,
    write_model,
)
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.source.files import WEIGHTS
from tests.support.failures import failing
from tests.support.families import tiny_config
from tests.support.models.four_bit import convert
from tests.support.models.tiny import save_model


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A model with linear attention, whose decay is in 32 bit."""
    source, folder = save_model(tmp_path / "model", tiny_config("olmo_hybrid")), tmp_path / "written"
    convert(source, tmp_path / "base", QuantizationSpec())
    model = model_without_weights(source)
    folder.mkdir()
    write_model(model, DequantizedBase(BaseWeights(tmp_path / "base", model)), folder)
    return folder


def test_weights_in_32_bit_are_not_rounded(tmp_path: Path, written: Path) -> None:
    loaded = load_written(written, "eager")
    base = BaseWeights(tmp_path / "base", loaded)
    exact = {name: weight for name, weight in loaded.named_parameters() if weight.dtype == torch.float32}
    assert exact
    for name, weight in exact.items():
        assert torch.equal(weight, base[name])


def test_a_written_model_that_lacks_a_weight_is_rejected(written: Path) -> None:
    tensors = load_file(written / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), written / WEIGHTS, metadata={"format": "pt"})
    with failing(ExitCode.INTERNAL_ERROR, match="missing keys of the written model"):
        load_written(written, "eager")
