"""Tiny random models with real tokenizers, rows to train them on, and records kept in memory."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from qlora_trainer.core.records import RecordWriter

VOCABULARY = 512
JOB_UID = "7d0c2f5e-0000-4000-8000-000000000001"
POD_UID = "7d0c2f5e-0000-4000-8000-000000000002"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = [
    "List the pods of the namespace web and show their labels.",
    "kubectl get pods --namespace web --show-labels",
    "Which node runs the deployment of the shop? Scale it to three replicas.",
    "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly in fog.",
    "system user assistant question answer one two three four five six seven eight nine ten",
]


def save_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """Save a byte-level tokenizer of at most 512 tokens. It pads with the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_model(folder: Path, config: PretrainedConfig, chat_template: str | None = CHATML) -> Path:
    """Save a random model of this configuration and a tokenizer, as in a hub's folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder, chat_template)
    return folder


SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


class Recorded(RecordWriter):
    """Records in memory; every progress record is kept, however fast they come."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        seconds = iter(range(0, 10**9, 10))
        super().__init__(self.stream, lambda: float(next(seconds)))

    @property
    def written(self) -> list[dict[str, Any]]:
        """The records so far, parsed."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl file of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_row(question: str, answer: str) -> dict[str, Any]:
    """A row of format chat with one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
