"""The config.json of a model that is planned without a network."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_api.contract import ExitCode
from qlora_api.sources import HubSource
from qlora_api.spec.model import BaseModelSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.source import hub_config
from qlora_trainer.model.source.hub_config import PACKAGED, FoundConfig, find_hub_config, packaged_config
from tests.support.models.model_configs import PUBLISHED_PARAMETERS

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture(autouse=True)
def _without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_config, "hub_answers", lambda *_: False)


def found(repository: str, revision: str | None = None) -> FoundConfig:
    model = BaseModelSpec(source=f"hf://{repository}", revision=revision)
    return find_hub_config(HubSource(repository), model, "or give it")


@pytest.mark.parametrize("repository", PUBLISHED_PARAMETERS)
def test_a_packaged_config_describes_all_published_weights(repository: str) -> None:
    path = packaged_config(repository)
    assert path is not None
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    kind = AutoModelForImageTextToText if "vision_config" in json.loads(path.read_text()) else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    assert model.num_parameters() == PUBLISHED_PARAMETERS[repository]


def test_no_other_config_is_packaged() -> None:
    assert {path.stem.replace("--", "/") for path in PACKAGED.iterdir()} == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("revision", [None, "main"])
def test_the_packaged_config_is_taken_and_named_where_there_is_no_hub(revision: str | None) -> None:
    config = found(LLAMA, revision)
    assert json.loads(config.path.read_text())["num_hidden_layers"] == 16
    assert config.remark == f"config of {LLAMA} as packaged with this release; the Hub cannot be reached"
    assert found("meta-llama/Llama-3.2-1B").path == config.path


@pytest.mark.parametrize(
    ("repository", "revision", "words"),
    [
        (LLAMA, "v1.0", "is that of the revision main, and spec.model.revision is v1.0"),
        ("acme/tiny", None, "or give it"),
    ],
    ids=["another revision", "another model"],
)
def test_no_other_config_is_taken_instead(repository: str, revision: str | None, words: str) -> None:
    with pytest.raises(StepFailure, match="the hub cannot be reached for hf://") as failure:
        found(repository, revision)
    assert failure.value.exit_code is ExitCode.UNREACHABLE
    assert failure.value.message.endswith(words)


def test_a_cached_config_comes_first(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / f"models--{LLAMA.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
    cached = kept / "snapshots" / ("0" * 40) / "config.json"
    cached.write_text("{}")
    assert found(LLAMA) == FoundConfig(cached)
