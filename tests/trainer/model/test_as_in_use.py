"""The frozen base computes in training what it computes in use: without dropout of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from qlora_api.training import LoraSpec
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.shrunken import shrunken
from qlora_trainer.model.support import inspect_family
from tests.support.adapted import adapted
from tests.support.families import tiny_config
from tests.support.sequences import CPU, random_sequence
from tests.support.tiny import save_model

# OPT and XGLM drop values by default. Some drop the results of layers, or whole blocks.
DROPPING: dict[str, dict[str, Any]] = {
    "opt": {"layerdrop": 0.5},
    "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
    "xglm": {"layerdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


def loss_of(model: Any) -> float:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return float(batch_loss(model.get_base_model(), Batch.of([random_sequence((40,), 1)], CPU)))


@pytest.mark.parametrize("family", DROPPING)
def test_a_bases_own_dropout_is_off_and_the_adapters_is_not(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    for name, value in DROPPING[family].items():
        setattr(config, name, value)
    save_model(tmp_path, config)
    without, with_dropout = (adapted(tmp_path, dropout=dropout) for dropout in (0.0, 0.5))
    for model in (without, with_dropout):
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.constant_(parameter, 0.05)

    in_training = [loss_of(without) for _ in range(3)]

    assert in_training == [loss_of(without.eval())] * 3
    assert loss_of(with_dropout) != loss_of(with_dropout)


def test_dropout_of_attention_keeps_no_mixture_of_experts_from_being_trained(tmp_path: Path) -> None:
    shrunken(AutoConfig.for_model("gpt_oss", attention_dropout=0.1)).config.save_pretrained(tmp_path)

    assert inspect_family(tmp_path, LoraSpec()).mixture_of_experts
