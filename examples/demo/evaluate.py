"""Compares the base model with the tuned one on the held-out requests: answers side by side, score and loss.

The base is stored in 4-bit as it was in training, the adapter is loaded by plain PEFT, and answers are greedy, so the
numbers repeat. With --16-bit, the base is the original one, as on a server without bitsandbytes.

    python examples/demo/evaluate.py --model DIR --adapter DIR --held-out FILE [--limit N] [--show N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from score import Score, is_right, score
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

MAX_NEW_TOKENS = 40  # the longest command of the data set has 28
BATCH_SIZE = 48
COLUMN = 37  # characters


@dataclass(frozen=True)
class Question:
    """A held-out row: what the model sees, and the right command."""

    prompt: tuple[dict[str, str], ...]
    expected: str

    @property
    def request(self) -> str:
        """The user's words."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True)
class Outcome:
    """One model's answers, their score, and the right commands' loss (nats per token)."""

    answers: tuple[str, ...]
    score: Score
    loss: float


def read_questions(path: Path, limit: int | None) -> list[Question]:
    """Read ``limit`` chat rows of a JSONL file. Raises ValueError with the line."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:limit], start=1):
        try:
            *prompt, answer = json.loads(line)["messages"]
            questions.append(Question(tuple(prompt), answer["content"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected {{"messages": [...]}}, found {line[:80]!r}') from error
    if not questions:
        raise ValueError(f"{path}: expected at least one row, found none")
    return questions


def load(model_folder: Path, adapter: Path, *, in_16_bit: bool) -> tuple[Any, Any]:
    """Load the base with the adapter, and a left-padding tokenizer."""
    # Here and not above, because bitsandbytes writes to the log as it is imported.
    import bitsandbytes as bnb
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=torch.bfloat16,
        quantization_config=None
        if in_16_bit
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Its fast path for CPUs repacks the weights in place at the first forward and keeps them so.
            module.support_avx512bf16_for_cpu = False
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


def measure(model: Any, tokenizer: Any, questions: Sequence[Question]) -> Outcome:
    """Ask every question and compute the loss of every right command."""
    answers: list[str] = []
    total_loss, total_tokens = 0.0, 0
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        answers += generate(model, tokenizer, batch)
        loss, tokens = completion_loss(model, tokenizer, batch)
        total_loss, total_tokens = total_loss + loss, total_tokens + tokens
    return Outcome(tuple(answers), score(answers, [q.expected for q in questions]), total_loss / total_tokens)


def render(tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """The questions as the model sees them, up to where its answer starts."""
    return [
        tokenizer.apply_chat_template(list(q.prompt), tokenize=False, add_generation_prompt=True) for q in questions
    ]


def generate(model: Any, tokenizer: Any, questions: Sequence[Question]) -> list[str]:
    """Greedy answers, one for each question."""
    prompts = render(tokenizer, questions)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    answers: list[str] = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def completion_loss(model: Any, tokenizer: Any, questions: Sequence[Question]) -> tuple[float, int]:
    """Return summed cross-entropy (nats) and tokens of the commands with end token."""
    prompts = render(tokenizer, questions)
    completions = [q.expected + tokenizer.eos_token for q in questions]
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    # Padded on the left, so every command ends at the last position.
    lengths = [len(ids) for ids in tokenizer(completions, add_special_tokens=False)["input_ids"]]
    width = max(lengths)
    logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float()
    targets = inputs["input_ids"][:, -width:].clone()
    for target, length in zip(targets, lengths, strict=True):
        target[: width - length] = -100
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss.item(), sum(lengths)


def side_by_side(questions: Sequence[Question], base: Outcome, tuned: Outcome, show: int) -> str:
    """Return a table of ``show`` questions with base and tuned answers, right ones ✓."""
    lines = []
    rule = "-+-".join("-" * COLUMN for _ in range(3))
    cells: list[tuple[str, ...]] = [("Request", "Base model", "Tuned model")]
    for question, before, after in list(zip(questions, base.answers, tuned.answers, strict=True))[:show]:
        cells.append((question.request, *(mark(answer, question.expected) for answer in (before, after))))
    for row in cells:
        columns = [textwrap.wrap(cell, COLUMN, max_lines=5, placeholder=" …") for cell in row]
        for line in zip_longest(*columns, fillvalue=""):
            lines.append(" | ".join(part.ljust(COLUMN) for part in line).rstrip())
        lines.append(rule)
    return "\n".join(lines)


def mark(answer: str, expected: str) -> str:
    """The answer, with whether it is right."""
    return f"{'✓' if is_right(answer, expected) else '✗'} {answer}"


def summary(base: Outcome, tuned: Outcome) -> str:
    """Scores and losses of both, one measure per line."""

    def right(outcome: Outcome) -> str:
        return f"{outcome.score.exact} of {outcome.score.total} ({outcome.score.share:.0%})"

    return "\n".join(
        (
            f"{'Held-out requests':<28}{'base':>16}{'tuned':>16}",
            f"{'Right commands':<28}{right(base):>16}{right(tuned):>16}",
            f"{'Right parts of a command':<28}{base.score.partial:>16.0%}{tuned.score.partial:>16.0%}",
            f"{'Loss (nats per token)':<28}{base.loss:>16.3f}{tuned.loss:>16.3f}",
        )
    )


def as_record(questions: Sequence[Question], base: Outcome, tuned: Outcome) -> dict[str, Any]:
    """Everything measured, for a program to read."""
    outcomes = {"base": base, "tuned": tuned}
    return {
        **{name: {**asdict(o.score), "score": o.score.share, "loss": o.loss} for name, o in outcomes.items()},
        "answers": [
            {"request": q.request, "expected": q.expected, "base": before, "tuned": after}
            for q, before, after in zip(questions, base.answers, tuned.answers, strict=True)
        ],
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare base and tuned model on held-out requests.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the base model")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="folder of the LoRA adapter")
    parser.add_argument("--held-out", type=Path, required=True, metavar="FILE", help="chat rows, JSONL")
    parser.add_argument("--16-bit", action="store_true", dest="in_16_bit", help="on the original base, not in 4-bit")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N rows only (default: all)")
    parser.add_argument("--show", type=int, default=6, metavar="N", help="answers to print (default: 6)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured to this file")
    return parser.parse_args()


def quiet() -> None:
    """Silence libraries' notices and progress bars, but not errors."""
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()


def main() -> int:
    """Measure and print; returns the exit code."""
    options = parse_arguments()
    quiet()
    try:
        questions = read_questions(options.held_out, options.limit)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    model, tokenizer = load(options.model, options.adapter, in_16_bit=options.in_16_bit)
    with torch.inference_mode():
        with model.disable_adapter():
            base = measure(model, tokenizer, questions)
        tuned = measure(model, tokenizer, questions)
    print(side_by_side(questions, base, tuned, options.show), summary(base, tuned), sep="\n\n")
    if options.json is not None:
        options.json.write_text(json.dumps(as_record(questions, base, tuned), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
