"""Targets of a conversation, token by token, with templates in the style of common model families.

Each template is written once, with the marks `{% generation %}` around the model's words. With the marks transformers
itself finds their tokens; the trainer is given the template without them, as most models have it, and must find the
same. Two things differ by design: the first token of a row is never a target, as nothing predicts it, and the mark that
ends a turn is learned (the templates here put it inside the marks, with a line's end after it outside).
"""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_trainer.data.examples.example import Conversation, Message
from qlora_trainer.data.render.chat_template import Tokenizer as TrainersTokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system prompt goes into the first question, and answers begin with a blank that belongs to their first token.
MISTRAL = (
    "{% set ns = namespace(system='') %}{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{% generation %}{{ ' ' + m.content + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
# The model's role has another name, and a system prompt goes into the first turn.
GEMMA = (
    "{{ '<bos>' }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content | trim + '\\n\\n' %}"
    "{% elif m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<start_of_turn>user\\n' + ns.system + m.content | trim + '<end_of_turn>\\n' }}"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
# A mark follows the whole conversation where no answer is requested.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# Reasoning is kept in answers after the last question only, with an empty one as the default.
QWEN_3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% set said = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{% set said = '<think>\\n' + thought + '\\n</think>\\n\\n' + said %}{% endif %}"
    "{% generation %}{{ said + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ said + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi": PHI,
    "qwen-3": QWEN_3,
}
MARKS = [
    *("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "<bos>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
]

SYSTEM = {"role": "system", "content": "Answer in one line."}
ONE_TURN = [{"role": "user", "content": "Which pods run?"}, {"role": "assistant", "content": "kubectl get pods"}]
SEVERAL_TURNS = [
    *ONE_TURN,
    {"role": "user", "content": "Which pods run?"},
    # The same answer again, and one that repeats the question.
    {"role": "assistant", "content": "kubectl get pods"},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Which pods run? None: überhaupt keine 🎉."},
]
THINKING = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "<think>\nI count three.\n</think>\n\nThree."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "<think>\nI count again.\n</think>\n\nThree, yes."},
]
CONVERSATIONS = {
    "one turn": ONE_TURN,
    "system prompt": [SYSTEM, *ONE_TURN],
    "several turns": SEVERAL_TURNS,
    "system prompt and several turns": [SYSTEM, *SEVERAL_TURNS],
    "thinking": THINKING,
    "ends with a question": [*ONE_TURN, {"role": "user", "content": "And now?"}],
}


def without_marks(template: str) -> str:
    """The template as of a model without marks of the generated part."""
    return re.sub(r"{%-? *(end)?generation *-?%}", "", template)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a byte-level tokenizer with all families' marks. Words begin with blanks."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=MARKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [message["content"] for conversation in CONVERSATIONS.values() for message in conversation]
    tokenizer.train_from_iterator(corpus, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    # As with many models, padding and end are the same token.
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    return folder


def learnt_by(folder: Path, template: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """The trainer's tokens of a conversation, and which of them are targets."""
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = TrainersTokenizer(folder)
    conversation = Conversation(tuple(Message(message["role"], message["content"]) for message in messages))
    [row] = tokenizer.tokenize([tokenizer.render(conversation, "line 1")], "completion")
    return list(row.input_ids), list(row.is_target)


def generated(folder: Path, template: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and the generated ones according to transformers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("marked", [False, True], ids=["plain", "with marks"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_the_learned_tokens_are_those_that_the_template_marks_as_generated(
    family: str, marked: bool, messages: list[dict[str, str]], tokenizer_folder: Path
) -> None:
    template = TEMPLATES[family]
    expected_ids, expected = generated(tokenizer_folder, template, messages)

    ids, found = learnt_by(tokenizer_folder, template if marked else without_marks(template), messages)

    assert ids == expected_ids
    assert found == expected
    assert any(found)
    assert not all(found)


EXPECTED = {
    "chatml": ["First.<|im_end|>", "Second.<|im_end|>"],
    "llama-3": ["First.<|eot_id|>", "Second.<|eot_id|>"],
    "mistral": [" First.</s>", " Second.</s>"],
    "gemma": ["First.<end_of_turn>", "Second.<end_of_turn>"],
    "phi": ["First.<|end|>", "Second.<|end|>"],
    "qwen-3": ["First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"],
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_is_learned_with_the_mark_that_ends_it(family: str, tokenizer_folder: Path) -> None:
    messages = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second."},
    ]

    ids, is_target = learnt_by(tokenizer_folder, without_marks(TEMPLATES[family]), messages)

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stretches, before = [], False
    for token, target in zip(ids, is_target, strict=True):
        if target and not before:
            stretches.append([token])
        elif target:
            stretches[-1].append(token)
        before = target
    assert [tokenizer.decode(stretch) for stretch in stretches] == EXPECTED[family]
