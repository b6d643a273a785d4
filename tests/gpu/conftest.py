"""Skips, with the reason, what this machine has no GPU, too few of them or too little memory for."""

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.trainer.tiny import SHAPE, save_model


@cache
def _cards() -> tuple[float, ...]:
    """Memory of each visible GPU in GiB."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(
        torch.cuda.get_device_properties(index).total_memory / 2**30 for index in range(torch.cuda.device_count())
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a CUDA GPU; the mark `gpu(cards=…, gib=…)` says how many and how large."""
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        mark = item.get_closest_marker("gpu")
        cards = mark.kwargs.get("cards", 1) if mark else 1
        gib = mark.kwargs.get("gib", 0) if mark else 0
        found = [card for card in _cards() if card >= gib]
        if len(found) < cards:
            size = f" of at least {gib} GiB" if gib else ""
            item.add_marker(pytest.mark.skip(reason=f"needs {cards} CUDA GPU{size}, this machine has {len(found)}"))


@pytest.fixture(autouse=True, scope="session")
def _offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with a ChatML template. Do not change it: copy it."""
    return save_model(tmp_path_factory.mktemp("llama") / "model", LlamaConfig(**SHAPE))


@pytest.fixture(scope="session")
def one_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random model of the shape of Llama 3.2 1B, with the small tokenizer."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
    )
    return save_model(tmp_path_factory.mktemp("billion") / "model", config)
