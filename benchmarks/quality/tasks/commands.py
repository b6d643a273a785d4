"""The demo's commands: a request in English and the kubectl command that answers it, in a different split."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.quality.tasks.task import Row, Task, shuffled
from examples.demo.score import is_right

_FILE = Path(__file__).parents[3] / "examples" / "demo" / "train.jsonl"


def _rows(random: Random) -> Iterator[Row]:
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    for _, user, assistant in shuffled(random, [json.loads(line)["messages"] for line in lines]):
        yield Row(f"{user['content']}\n", assistant["content"])


TASK = Task(
    name="commands",
    says="answer a request with one kubectl command (the rows of the demo)",
    rows=_rows,
    is_right=is_right,
    train_rows=112,
    max_answer_tokens=40,
)
