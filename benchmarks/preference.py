"""Measures the effect of DPO on a small model, taught to answer in one sentence; writes `results/preference.json`.

With `--objectives orpo` it is ORPO, and `results/preference-orpo.json`.

The pairs are from the model: of its answer to a question, the first sentence is preferred to the first three. The score
is the share of its answers to other questions that are one sentence and end there.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.inputs import RESULTS, model_folder, write_result
from benchmarks.machine import describe_environment, describe_machine
from benchmarks.trainer import prepared_context, train_here

PAIRS = Path(__file__).parent.parent / "examples" / "preference"
QUESTIONS = ("What is a {}?", "How does a {} work?")
THINGS = (
    *("lighthouse", "compass", "telescope", "thermometer", "pendulum", "windmill", "steam engine", "bicycle"),
    *("canal lock", "bridge", "railway", "kite", "piano", "drum", "clock", "candle", "battery", "magnet", "mirror"),
    *("camera", "telephone", "radio", "kettle", "loom"),
)
HELD_OUT_THINGS = ("prism", "pulley", "parachute", "submarine", "greenhouse", "umbrella", "bell", "violin")
MAX_NEW_TOKENS = 56
# Questions that are answered at a time.
_TOGETHER = 24
_SENTENCE = re.compile(r"[^.!?]*[.!?](?=\s|$)")
TRAINING: dict[str, Any] = {
    "epochs": 3,
    "packing": False,
    "microBatchSize": 4,
    "gradientAccumulationSteps": 1,
    "maxSequenceLength": 256,
    "learningRate": 1e-4,
    "scheduler": "linear",
    "warmupSteps": 2,
    "evalEverySteps": 12,
    "gradientCheckpointing": False,
    "samples": 0,
}
LORA = {"rank": 16, "alpha": 32}


def main() -> int:
    """Make the pairs if they do not exist, train with each objective, score, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference", description=__doc__)
    parser.add_argument("--objectives", nargs="+", choices=("dpo", "orpo"), default=("dpo",))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine, model = describe_machine(), model_folder()
    if not (PAIRS / "train.jsonl").is_file():
        asked = _questions(THINGS)
        write_pairs("train", asked, answers(model, None, asked))
    held_out = _questions(HELD_OUT_THINGS)
    before = list(answers(model, None, held_out))
    write_pairs("held-out", held_out, before)
    runs = {objective: _run(objective, model, held_out) for objective in options.objectives}
    result = {
        "machine": machine,
        "environment": describe_environment(),
        "training": TRAINING,
        "lora": LORA,
        "questions": held_out,
        "before": {"score": score(before), "answers": before},
        "runs": runs,
    }
    print(f"{'':10} {'one sentence':>14} {'held-out accuracy':>20}")
    print(f"{'before':10} {score(before):14.0%}")
    for name, run in runs.items():
        print(f"{name:10} {run['score']:14.0%} {run['evaluations'][-1]['evalAccuracy']:20.0%}")
    name = "-".join(("preference", *(objective for objective in options.objectives if objective != "dpo")))
    print(f"\n{write_result(name, result, options.output)}")
    return 0


def _questions(things: Sequence[str]) -> list[str]:
    return [question.format(thing) for question in QUESTIONS for thing in things]


def write_pairs(name: str, questions: Sequence[str], given: Iterable[str]) -> None:
    """Write the pairs made of the model's answers."""
    PAIRS.mkdir(exist_ok=True)
    pairs = [pair(*asked) for asked in zip(questions, given, strict=True)]
    (PAIRS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs if row))


def pair(question: str, answer: str) -> dict[str, str] | None:
    """The preference for brevity made of an answer; None if it is one sentence already."""
    sentences = sentences_of(answer)
    if len(sentences) < 2:
        return None
    return {"prompt": question, "chosen": sentences[0], "rejected": " ".join(sentences[:3])}


def sentences_of(answer: str) -> list[str]:
    """The whole sentences of a text."""
    return [found.strip() for found in _SENTENCE.findall(answer)]


def score(given: Sequence[str]) -> float:
    """The share of answers that are one sentence. One that was cut off has an end without a full stop, or more."""
    short = [answer for answer in given if sentences_of(answer) == [answer.strip()]]
    return len(short) / len(given)


def _run(objective: str, model: Path, questions: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="qlora-preference-") as scratch:
        folder = Path(scratch)
        for name in ("train.jsonl", "held-out.jsonl"):
            (folder / name).write_bytes((PAIRS / name).read_bytes())
        training = {**TRAINING, "objective": objective}
        held_out = {"eval": {"source": "pvc://data/held-out.jsonl"}}
        context = prepared_context(folder, model, training, LORA, held_out)
        began = time.monotonic()
        train_here(context)
        seconds = time.monotonic() - began
        lines = [json.loads(line) for line in (context.workspace.report / "metrics.jsonl").read_text().splitlines()]
        after = list(answers(model, context.workspace.trained, questions))
    evaluations = [line for line in lines if "evalLoss" in line]
    steps = [line for line in lines if "loss" in line]
    return {
        "score": score(after),
        "seconds": round(seconds),
        "evaluations": evaluations,
        "steps": steps,
        "answers": after,
    }


def answers(model: Path, adapter: Path | None, questions: Sequence[str]) -> Iterator[str]:
    """The model's greedy answer to each question, in 16 bit and with the adapter if there is one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    for first in range(0, len(questions), _TOGETHER):
        asked = [[{"role": "user", "content": question}] for question in questions[first : first + _TOGETHER]]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            found = loaded.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        yield from tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
