"""Skips tests that need more than this machine's GPUs, with the reason, and writes the measurements of the others.

A GPU that exists and cannot be used is no reason to skip: then nothing runs, and pytest reports it and fails.
"""

import gc
import importlib.util
import json
import os
import time
from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.gpu.cards import Card, lacking, unusable
from tests.gpu.figures import Figure, Figures, report
from tests.gpu.runs import new_billion, on_gpu
from tests.support.commands.command import Files, new_files
from tests.support.commands.image import IMAGE
from tests.support.models.tiny import SHAPE, save_model

FILE = "QLORA_GPU_FIGURES"
"""The environment variable that names the file of the figures; by default `gpu-figures.json`, beside pyproject.toml."""
LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft")
_started = pytest.StashKey[float]()
_figures = pytest.StashKey[list[Figure]]()
_outcomes = pytest.StashKey[dict[str, str]]()


@cache
def _cards() -> tuple[Card, ...]:
    """The visible GPUs, in the order of their use."""
    if importlib.util.find_spec("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Card(card.name, (card.major, card.minor), card.total_memory / 2**30) for card in found)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Require CUDA GPUs for each test: `gpu(cards=…, gib=…)` sets number and size."""
    config.stash[_started] = time.monotonic()
    ours = [item for item in items if _is_ours(item.path)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if ours and not _cards():
        _require_no_driver(visible)
    for item in ours:
        mark = item.get_closest_marker("gpu")
        wanted = mark.kwargs if mark else {}
        reason = lacking(_cards(), wanted.get("cards", 1), wanted.get("gib", 0), visible)
        if reason is None and IMAGE in os.environ and item.get_closest_marker("image") is None:
            reason = f"{IMAGE} is set, and this test computes without the command line"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _require_no_driver(visible: str | None) -> None:
    import torch

    problem = unusable(torch.__version__, torch.version.cuda, visible)
    if problem is not None:
        raise pytest.UsageError(problem)


def _is_ours(path: Path) -> bool:
    return Path(__file__).parent in path.parents


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Collect measurements: `figures.add("peak memory", 44.1, "GB", limit=45.0)`."""
    kept = request.config.stash.setdefault(_figures, [])
    return Figures(request.node.nodeid.removeprefix("tests/gpu/"), kept)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note how each test of this folder ends."""
    ended = yield
    if _is_ours(item.path) and (ended.when == "call" or ended.outcome != "passed"):
        reason = ended.longrepr[2] if ended.skipped and isinstance(ended.longrepr, tuple) else ended.outcome
        outcomes = item.config.stash.setdefault(_outcomes, {})
        test = item.nodeid.removeprefix("tests/gpu/")
        # A test that has failed stays so, whatever its fixtures do afterwards.
        outcomes[test] = "failed" if outcomes.get(test) == "failed" else reason.removeprefix("Skipped: ")
    return ended


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the measurements, and write them if a GPU was used."""
    outcomes = config.stash.get(_outcomes, {})
    if not _cards() or not {"passed", "failed"} & set(outcomes.values()):
        return
    measured = config.stash.get(_figures, [])
    path = Path(os.environ.get(FILE, config.rootpath / "gpu-figures.json"))
    found = report(
        measured,
        _cards(),
        {name: version(name) for name in LIBRARIES},
        outcomes,
        date=datetime.now(UTC).date().isoformat(),
        seconds=time.monotonic() - config.stash[_started],
    )
    path.write_text(json.dumps(found, indent=2) + "\n")
    terminalreporter.section(f"measured on {found['card']}")
    for figure in measured:
        limit = "" if figure.limit is None else f" (limit {figure.limit:,.4g})"
        terminalreporter.write_line(f"{figure.name}: {figure.text}{limit}")
    terminalreporter.write_line(f"{len(measured)} figures are in {path}")


@pytest.fixture(autouse=True, scope="session")
def _offline() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _give_back() -> Iterator[None]:
    """Free the GPU for the next test's processes: models are in reference cycles."""
    yield
    import torch

    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with a ChatML template. Do not change it: copy it."""
    return save_model(tmp_path_factory.mktemp("llama") / "model", LlamaConfig(**SHAPE))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Files:
    """A prepared job on the two-layer Llama. Do not change it: copy it.

    A copy may have other settings for training, as far as prepare does nothing with them: not its `maxSequenceLength`,
    and none of `lora`.
    """
    return on_gpu(new_files(tmp_path_factory.mktemp("tiny") / "job", tiny_llama.parent), "prepare")


@pytest.fixture(scope="session")
def billion(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """As `tiny`, on a random model of the shape of Llama 3.2 1B, quantized once."""
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
    folder = tmp_path_factory.mktemp("billion")
    return on_gpu(new_billion(folder / "job", save_model(folder / "models" / "model", config).parent), "prepare")
