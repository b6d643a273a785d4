"""The figures of the page on choosing a model are those of its weights."""

import json
import re
from pathlib import Path

import pytest

from qlora_api.gpus import GPUS
from qlora_api.memory.estimate import GIB, without_activations
from qlora_api.memory.model_shape import ModelShape, mixes_experts
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.memory.weights import count_weights
from qlora_trainer.model.source.hub_config import packaged_config
from tests.support.models.model_configs import PUBLISHED_PARAMETERS

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "choose-a-model.md"
ROWS = {
    name: cells.split(" | ")
    for name, cells in re.findall(r"^\| `(\S+/\S+)` \| ([\d.]+, .*) \|$", PAGE.read_text(), re.MULTILINE)
}
CONFIGS = {name: json.loads(path.read_text()) for name in PUBLISHED_PARAMETERS if (path := packaged_config(name))}
DENSE = [name for name, config in CONFIGS.items() if not mixes_experts(config)]


@pytest.mark.parametrize("name", DENSE)
def test_each_dense_model_has_the_figures_of_its_sizes(name: str) -> None:
    """All cells are those of a dry run; see tests/trainer/model/memory/test_measure.py."""
    training = TrainingShape(rank=16)
    weights = count_weights(ModelShape.from_config(CONFIGS[name]), training)
    memory = without_activations(weights, training)
    # Two checkpoints, with 12 bytes for each weight of the adapter, and two copies of it.
    run = weights.adapter_parameters * (2 * 12 + 2 * 4)
    *gpu, download, base, checkpoints = ROWS[name]
    assert (download, base, checkpoints) == (
        f"{PUBLISHED_PARAMETERS[name] * 2 / 1e9:.1f}",
        f"{(memory.base_weights + memory.unquantized_weights) / 1e9:.1f}",
        f"{run / 1e9:.1f}",
    )
    needed = [float(cell.partition(",")[0]) for cell in gpu]
    least = round(memory.expected / GIB, 1)
    assert [least, *needed] == sorted([least, *needed])


def test_each_row_names_gpus_with_enough_memory() -> None:
    sizes = {gpu.label: gpu.gib for gpu in GPUS.values() if gpu.has_bfloat16}
    cells = [cell.partition(", ")[::2] for row in ROWS.values() for cell in row[:3]]
    assert all(float(needed) < sizes[label] for needed, label in cells)


def test_no_other_model_has_figures() -> None:
    assert list(ROWS) == list(PUBLISHED_PARAMETERS)
