"""Preference tuning as a plain loop: padded, with full logits, and a frozen reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


@dataclass(frozen=True)
class PlainPair:
    """Chosen and rejected as a collator makes them: two rows of one length."""

    input_ids: Tensor
    """int64 [2, tokens]"""
    attention_mask: Tensor
    is_answer: Tensor
    """bool [2, tokens]: the tokens of the answer, its end mark included."""

    @classmethod
    def of(cls, prompt: list[dict[str, str]], chosen: str, rejected: str, model: Path) -> "PlainPair":
        """The pair of a prompt in messages, tokenized by prefixes."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(asked, add_special_tokens=False).input_ids)
        rows = []
        for answer in (chosen, rejected):
            text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            rows.append((ids, len(ids) - ids[::-1].index(end)))
        longest = max(len(ids) for ids, _ in rows)
        return cls(
            torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            torch.tensor([[start <= place < last for place in range(longest)] for _, last in rows]),
        )

    @property
    def answer_tokens(self) -> Tensor:
        """The number of tokens of each answer, int64 [2]."""
        return self.is_answer.sum(dim=1)


def plain_model(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """Build the model of PEFT's quantization guide, with `tensors` as adapter weights."""
    base = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        dtype=dtype,
        attn_implementation="eager",
        device_map={"": "cpu"},
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    parameters = plain_parameters(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return model.train()


def frozen_base(folder: Path) -> Any:
    """A second model, which is the reference of DPO: the base in 4-bit, in float32.

    In training mode, because there bitsandbytes does not round to 16 bit on a CPU. It has no dropout.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        dtype=torch.float32,
        attn_implementation="eager",
        device_map={"": "cpu"},
    )
    return model.requires_grad_(requires_grad=False).train()


def plain_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by their name in the adapter's file."""
    return {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}


def log_likelihoods(model: Any, pair: PlainPair) -> Tensor:
    """float32 [2]: summed over the answers' tokens, from the full logits."""
    logits = model(input_ids=pair.input_ids, attention_mask=pair.attention_mask, use_cache=False).logits
    likelihoods = logits[:, :-1].log_softmax(dim=-1).gather(2, pair.input_ids[:, 1:, None]).squeeze(2)
    return (likelihoods * pair.is_answer[:, 1:]).sum(dim=1)


def plain_dpo(likelihoods: Tensor, reference: Tensor, beta: float, smoothing: float) -> Tensor:
    """The loss of one pair: equation 7 of Rafailov et al. 2023 (arXiv 2305.18290).

    With the probability `smoothing` the answers are swapped (conservative DPO, Mitchell 2023).
    """
    chosen, rejected = beta * (likelihoods - reference)
    preferred = torch.sigmoid(chosen - rejected)
    return -(1 - smoothing) * preferred.log() - smoothing * (1 - preferred).log()


def plain_orpo(likelihoods: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """The loss of one pair: equations 3 to 7 of Hong et al. 2024 (arXiv 2403.07691)."""
    means = (likelihoods / tokens).exp()
    odds = means / (1 - means)
    return -means[0].log() - beta * torch.sigmoid((odds[0] / odds[1]).log()).log()


@dataclass(frozen=True)
class PlainStep:
    """Results of a plain loop for one step: means over the pairs."""

    loss: float
    chosen_reward: float
    rejected_reward: float
    accuracy: float
    grad_norm: float


def plain_steps(
    model: Any, reference: Any, pairs: Sequence[PlainPair], objective: str, beta: float, smoothing: float, rate: float
) -> Iterator[PlainStep]:
    """Steps of PyTorch's AdamW over all pairs, one at a time."""
    parameters = plain_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    while True:
        losses, rewards = [], []
        for pair in pairs:
            with torch.no_grad():
                fixed = log_likelihoods(reference, pair)
            found = log_likelihoods(model, pair)
            if objective == "dpo":
                loss = plain_dpo(found, fixed, beta, smoothing)
                rewards.append(beta * (found - fixed).detach())
            else:
                loss = plain_orpo(found, pair.answer_tokens, beta)
                rewards.append(beta * (found / pair.answer_tokens).detach())
            (loss / len(pairs)).backward()
            losses.append(float(loss.detach()))
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        chosen, rejected = torch.stack(rewards).T
        preferred = float((chosen > rejected).float().mean())
        yield PlainStep(sum(losses) / len(losses), float(chosen.mean()), float(rejected.mean()), preferred, float(norm))
