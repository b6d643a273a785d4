"""The demo's data set: English requests and the one kubectl command that answers each.

Writes ``train.jsonl`` and ``held-out.jsonl`` beside this file, the same bytes on every machine. The two sets share the
operations and nothing else: no workload, namespace, node or phrasing of a held-out request comes in training. A model
that answers held-out requests has learned the task and not the rows.

    python examples/demo/generate.py            # write both files
    python examples/demo/generate.py --check    # exit 1 when a file differs from what would be written
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

from vocabulary import (
    COMMANDS,
    HELD_OUT,
    KINDS,
    LABELS,
    LOCAL_PORTS,
    OPERATIONS,
    REMOTE_PORTS,
    SUFFIXES,
    TRAIN,
    Operation,
    Vocabulary,
)

FOLDER = Path(__file__).resolve().parent
SEED = 20260101
TRAIN_ROWS_PER_OPERATION = 22
HELD_OUT_ROWS_PER_OPERATION = 2
SYSTEM = "Answer with one kubectl command and nothing else."

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One example: a request in English and its kubectl command."""

    request: str
    command: str


def pick(rng: Random, values: Sequence[T]) -> T:
    """One of the values. Only ``Random.random`` is guaranteed to repeat across Python versions, so all draws use it."""
    return values[int(rng.random() * len(values))]


def fill(rng: Random, vocabulary: Vocabulary) -> dict[str, str]:
    """Draw a value for every gap that a command or a phrasing may have."""
    spoken_kind, spoken_kinds, kind, kinds = pick(rng, KINDS)
    noun = pick(rng, vocabulary.nouns)
    replicas = 2 + int(rng.random() * 8)
    return {
        "spoken_kind": spoken_kind,
        "spoken_kinds": spoken_kinds,
        "kind": kind,
        "kinds": kinds,
        "name": noun + pick(rng, SUFFIXES),
        "pod": f"{noun}{pick(rng, SUFFIXES)}-{int(rng.random() * 6)}",
        "namespace": pick(rng, vocabulary.namespaces),
        "node": pick(rng, vocabulary.nodes),
        "label": pick(rng, LABELS),
        "shell": pick(rng, COMMANDS),
        "measure": pick(rng, ("cpu", "memory")),
        "setting": pick(rng, ("timeout", "retries", "limit", "threads")),
        "version": f"{1 + int(rng.random() * 4)}.{int(rng.random() * 10)}",
        "local_port": pick(rng, LOCAL_PORTS),
        "remote_port": pick(rng, REMOTE_PORTS),
        "count": str(5 * (1 + int(rng.random() * 40))),
        "replicas": str(replicas),
        "maximum": str(replicas + 1 + int(rng.random() * 10)),
    }


def rows(
    rng: Random, vocabulary: Vocabulary, phrasings: Callable[[Operation], tuple[str, ...]], per_operation: int
) -> list[Row]:
    """``per_operation`` rows of each operation, its phrasings in turn, no command twice, in random order."""
    by_command: dict[str, Row] = {}
    for operation in OPERATIONS:
        templates = phrasings(operation)
        made = 0
        while made < per_operation:
            gaps = fill(rng, vocabulary)
            row = Row(templates[made % len(templates)].format(**gaps), operation.command.format(**gaps))
            if row.command not in by_command:
                by_command[row.command] = row
                made += 1
    return sorted(by_command.values(), key=lambda _: rng.random())


def train_rows() -> list[Row]:
    """The training set."""
    return rows(Random(SEED), TRAIN, lambda operation: operation.train, TRAIN_ROWS_PER_OPERATION)


def held_out_rows() -> list[Row]:
    """The held-out set."""
    return rows(Random(SEED + 1), HELD_OUT, lambda operation: operation.held_out, HELD_OUT_ROWS_PER_OPERATION)


def as_jsonl(examples: Iterable[Row]) -> str:
    """Chat format, one JSON object per line."""
    return "".join(
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": example.request},
                    {"role": "assistant", "content": example.command},
                ]
            }
        )
        + "\n"
        for example in examples
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check both files; returns the exit code."""
    parser = argparse.ArgumentParser(description="Generate the demo's data set.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the files (default: beside this script)")
    options = parser.parse_args(arguments)
    files = {"train.jsonl": as_jsonl(train_rows()), "held-out.jsonl": as_jsonl(held_out_rows())}
    if options.check:
        stale = [name for name, text in files.items() if read(options.folder / name) != text]
        for name in stale:
            print(f"{options.folder / name} is out of date; run generate.py again", file=sys.stderr)
        return 1 if stale else 0
    for name, text in files.items():
        (options.folder / name).write_text(text, encoding="utf-8", newline="\n")
    return 0


def read(path: Path) -> str | None:
    """The file's text; None when there is no such file."""
    return path.read_bytes().decode("utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
