"""Makes the inputs of every benchmark: the model's folder and a place for results."""

import json
from pathlib import Path
from typing import Any

from examples.demo.__main__ import model_folder

RESULTS = Path(__file__).parent / "results"

__all__ = ["RESULTS", "model_folder", "write_result"]


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result as `<name>.json`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
