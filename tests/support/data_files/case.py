"""A case of the corpus."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.models.tiny import chat_row

GOOD = json.dumps(chat_row("Which pods?", "kubectl get pods")) + "\n"
"""A row that can be trained on."""


@dataclass(frozen=True)
class BadData:
    """Files on the claim `data`, and prepare's message about them."""

    name: str
    files: Mapping[str, bytes]
    """Contents by path."""
    message: str
    """What the message has in it, or begins with if it begins with pvc://."""
    address: str = ""
    """Path on the claim; that of the only file if empty."""
    dataset: Mapping[str, Any] = field(default_factory=dict)
    """What else the job says of its data."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files below `folder`; returns the job's data set."""
        for path, content in self.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        address = self.address or next(iter(self.files))
        return {"source": f"pvc://data/{address}", **self.dataset}


def one_file(name: str, path: str, content: str | bytes, message: str, **dataset: Any) -> BadData:
    """A case of one file."""
    data = content.encode() if isinstance(content, str) else content
    return BadData(name, {path: data}, message, dataset=dataset)


def json_lines(name: str, content: str | bytes, message: str, **dataset: Any) -> BadData:
    """A JSONL file; the message begins with its name."""
    return one_file(name, "train.jsonl", content, f"pvc://data/train.jsonl{message}", **dataset)


def json_list(name: str, content: str | bytes, message: str) -> BadData:
    """A JSON file; the message begins with its name."""
    return one_file(name, "train.json", content, f"pvc://data/train.json{message}")


def second_line(name: str, line: str | bytes, message: str) -> BadData:
    """Return a JSONL file with a bad second row, whose place begins the message."""
    wrong = line.encode() if isinstance(line, str) else line
    return json_lines(name, GOOD.encode() + wrong, f" line 2{message}")
