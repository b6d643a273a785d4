"""The figures of the page on choosing a model are those of the memory estimate, and of what a workspace has to hold."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_api.memory.advice import verdict
from qlora_api.memory.estimate import GIB, estimate
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "how-to" / "choose-a-model.md"
MODELS: dict[str, dict[str, Any]] = yaml.safe_load(
    (ROOT / "tests" / "unit" / "qlora_api" / "memory_points.yaml").read_text()
)["models"]
NAMES = {
    "Llama 3.2 1B": "llama-3.2-1b",
    "Llama 3.2 3B": "llama-3.2-3b",
    "Qwen 2.5 7B": "qwen2.5-7b",
    "Llama 3.1 8B": "llama-3-8b",
    "Mistral Small 24B": "mistral-small-24b",
    "Seed-OSS 36B": "seed-oss-36b",
    "Llama 3.1 70B": "llama-3-70b",
}
GPUS = (16, 24, 32, 40, 48, 80)
"""GiB."""


def shape(model: dict[str, Any]) -> ModelShape:
    return ModelShape(
        model_type=model["type"],
        num_hidden_layers=model["layers"],
        hidden_size=model["hidden"],
        intermediate_size=model["mlp"],
        num_attention_heads=model["heads"],
        num_key_value_heads=model["kv_heads"],
        head_dim=model["head_dim"],
        vocab_size=model["vocabulary"],
        tie_word_embeddings=model["tied"],
    )


def gpu_memory(model: ModelShape, tokens: int) -> str:
    """The estimate at rank 16, and the smallest GPU on which it fits."""
    memory = estimate(model, TrainingShape(rank=16, sequence_length=tokens))
    gpu = next(size for size in GPUS if verdict(memory, size) == "fits")
    return f"{memory.expected / GIB:.1f}, on {gpu}"


def base_and_run(model: ModelShape) -> str:
    """GB of the base; of two checkpoints, with 12 bytes for each weight of the adapter, and two copies of it."""
    memory = estimate(model, TrainingShape(rank=16))
    base = memory.base_weights + memory.unquantized_weights
    return f"{base / 1e9:.1f} | {memory.adapters / 4 * (2 * 12 + 2 * 4) / 1e9:.1f}"


@pytest.mark.parametrize("name", NAMES)
def test_each_model_has_the_figures_that_its_sizes_give(name: str) -> None:
    model = MODELS[NAMES[name]]
    row = [
        name,
        *(gpu_memory(shape(model), tokens) for tokens in (512, 2048, 8192)),
        f"{model['parameters'] * 2 / 1e9:.1f}",
        base_and_run(shape(model)),
    ]
    assert f"| {' | '.join(row)} |" in PAGE.read_text().splitlines()


def test_no_other_model_has_figures() -> None:
    rows = re.findall(r"^\| (.+?) \| [\d.]+, on \d+ \|", PAGE.read_text(), re.MULTILINE)
    assert rows == list(NAMES)
