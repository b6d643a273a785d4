"""The frozen base computes the same in training as in use: no dropout, tokens to the same experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from qlora_api.spec.training import LoraSpec
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.experts.compute import expert_modules
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.families.tiny_model import shrink
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from tests.support.families import CASES, REPRESENTATIVE, tiny_config
from tests.support.models.adapted import NF4, adapted
from tests.support.models.four_bit import convert
from tests.support.models.sequences import CPU, random_sequence
from tests.support.models.tiny import VOCABULARY, save_model

# OPT and XGLM drop values by default. Some drop the results of layers, or whole blocks.
DROPPING: dict[str, dict[str, Any]] = {
    "opt": {"layerdrop": 0.5},
    "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
    "xglm": {"layerdrop": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


def loss_of(model: Any) -> float:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return float(batch_loss(model.get_base_model(), Batch.from_sequences([random_sequence((40,), 1)], CPU)))


@pytest.mark.parametrize("family", DROPPING)
def test_dropout_of_the_base_is_off_and_that_of_the_adapter_is_on(family: str, tmp_path: Path) -> None:
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


def test_a_mixture_of_experts_with_dropout_of_attention_is_trained(tmp_path: Path) -> None:
    shrink(AutoConfig.for_model("gpt_oss", attention_dropout=0.1)).config.save_pretrained(tmp_path)

    assert inspect_family(tmp_path, LoraSpec()).mixture_of_experts


def test_the_auxiliary_loss_of_routers_has_no_effect(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", experts=True)
    losses = []
    for wanted in (False, True):
        config.output_router_logits, config.router_aux_loss_coef = wanted, 1.0
        losses.append(loss_of(adapted(save_model(tmp_path / str(wanted), config))))

    assert losses[0] == losses[1]


def in_16_bit(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow)
        for name, case in CASES.items()
        if case.experts
    ],
)
def test_tokens_go_to_the_same_experts_as_without_autocast(family: str, tmp_path: Path) -> None:
    convert(save_model(tmp_path / "model", CASES[family].config()), tmp_path / "base", NF4)
    model = load_base(tmp_path / "base", NF4, "cpu", attention="eager")
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name, _ in expert_modules(model)]
    calls: list[tuple[Any, Any, Any]] = []
    chosen: list[tuple[Tensor, Tensor]] = []
    for _, experts in expert_modules(model):
        experts.register_forward_pre_hook(lambda _module, given: chosen.append((given[1], given[2])))

    def called(block: Any, given: Any, named: Any) -> None:
        calls.append((block, given, named))

    handles = [block.register_forward_pre_hook(called, with_kwargs=True) for block in blocks]
    tokens = torch.randint(VOCABULARY, (1, 400), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens, use_cache=False)
        for handle in handles:
            handle.remove()
        in_training, count = list(chosen), len(calls)
        chosen.clear()
        for block, given, named in calls:
            block(*map(in_16_bit, given), **{name: in_16_bit(value) for name, value in named.items()})

    assert len(in_training) == len(chosen) == count > 0
    for found, expected in zip(in_training, chosen, strict=True):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
