"""Skips, with the reason, what this machine has no GPU, too few of them, too old ones or too little memory for."""

import gc
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.gpu.cards import Card, lacking
from tests.support.tiny import SHAPE, save_model


@cache
def _cards() -> tuple[Card, ...]:
    """The visible GPUs, in the order in which they are taken."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Card(card.name, (card.major, card.minor), card.total_memory / 2**30) for card in found)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs a CUDA GPU; the mark `gpu(cards=…, gib=…)` says how many and how large."""
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        mark = item.get_closest_marker("gpu")
        wanted = mark.kwargs if mark else {}
        reason = lacking(_cards(), wanted.get("cards", 1), wanted.get("gib", 0))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """Leave the GPU to the next test, which may run in processes of its own: models hold themselves in cycles."""
    yield
    import torch

    gc.collect()
    torch.cuda.empty_cache()


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
