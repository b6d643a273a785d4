"""The figures of the page on choosing a model are those of its weights."""

import re
from pathlib import Path

import pytest

from qlora_api.memory.estimate import GIB, without_activations
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.memory.weights import count_weights
from tests.support.models.model_configs import TO_CHOOSE

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "choose-a-model.md"
ROWS = {
    name: cells.split(" | ")
    for name, cells in re.findall(r"^\| (.+?) \| ([\d.]+, on \d+ \| .*) \|$", PAGE.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("name", TO_CHOOSE)
def test_each_model_has_the_figures_of_its_sizes(name: str) -> None:
    """GPU memory is that of a dry run; see tests/trainer/model/memory/test_measure.py."""
    config, parameters = TO_CHOOSE[name]
    training = TrainingShape(rank=16)
    weights = count_weights(ModelShape.from_config(config), training)
    memory = without_activations(weights, training)
    # Two checkpoints, with 12 bytes for each weight of the adapter, and two copies of it.
    run = weights.adapter_parameters * (2 * 12 + 2 * 4)
    *gpu, download, base, checkpoints = ROWS[name]
    assert (download, base, checkpoints) == (
        f"{parameters * 2 / 1e9:.1f}",
        f"{(memory.base_weights + memory.unquantized_weights) / 1e9:.1f}",
        f"{run / 1e9:.1f}",
    )
    needed = [float(cell.partition(",")[0]) for cell in gpu]
    assert [memory.expected / GIB, *needed] == sorted([memory.expected / GIB, *needed])


@pytest.mark.parametrize("name", TO_CHOOSE)
def test_each_model_has_the_published_number_of_parameters(name: str) -> None:
    config, parameters = TO_CHOOSE[name]
    counted = count_weights(ModelShape.from_config(config), TrainingShape()).parameters
    assert counted == pytest.approx(parameters, rel=2e-4)


def test_no_other_model_has_figures() -> None:
    assert list(ROWS) == list(TO_CHOOSE)
