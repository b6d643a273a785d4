"""Answers of a batch: in 32 bit those of each prompt alone."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.evaluation.answers import Answering, AnswerTexts
from qlora_trainer.evaluation.prompts import Prompt
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.families.inspection import inspect_family
from tests.support.families import CASES, REPRESENTATIVE
from tests.support.models.adapted import NF4
from tests.support.models.tiny import save_model
from tests.support.resolved import resolved_lora

LENGTHS = (3, 12, 7, 12)
SKIPPED = {"granitemoehybrid": "transformers generates nothing without a block of attention"}


def answering(model: Path, tokenizer: Path, end: EndOfTurn | None = None) -> Answering:
    """The model in 32 bit, with an adapter that has an effect."""
    base = load_base(model, NF4, "cpu", attention="eager", compute_type="float32")
    torch.manual_seed(0)
    targets = inspect_family(model, resolved_lora(rank=4)).target_modules
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))
    return Answering(tuned, AnswerTexts(tokenizer, end), lambda: False, torch.device("cpu"))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow)
        for name in CASES
        if name not in SKIPPED
    ],
)
def test_a_batch_has_the_answers_of_each_prompt_alone(family: str, tmp_path: Path, tiny_llama: Path) -> None:
    tuned = answering(save_model(tmp_path, CASES[family].config()), tiny_llama)
    prompts = [Prompt(tuple(range(5 + length, 5 + 2 * length)), (5,)) for length in LENGTHS]

    for adapter in (False, True):
        alone = [tuned.answers([prompt], adapter=adapter, max_new_tokens=6)[0] for prompt in prompts]
        assert tuned.answers(prompts, adapter=adapter, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


def test_each_answer_of_a_batch_ends_at_its_own_end(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tuned = answering(tiny_llama, tiny_llama)
    prompts = [Prompt(tuple(tokenizer(text).input_ids), (5,)) for text in ("List", "<|im_start|>user\nList the pods")]
    whole = tuned.answers(prompts, adapter=True, max_new_tokens=12)
    # The second token of the first answer, which ends this one only.
    ends = tokenizer(whole[0]).input_ids[1]
    taught = answering(tiny_llama, tiny_llama, EndOfTurn(text=tokenizer.decode([ends]), token=ends))

    found = taught.answers(prompts, adapter=True, max_new_tokens=12)

    assert found == [text.partition(tokenizer.decode([ends]))[0] for text in whole]
    assert len(found[0]) < len(whole[0])
