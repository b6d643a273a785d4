"""The example notebooks are stored without outputs, and one line of each decides where its jobs run."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[3] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_has_no_outputs_and_one_line_to_change(file: Path) -> None:
    cells = json.loads(file.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    lines = "\n".join("".join(cell["source"]) for cell in code)
    assert re.findall(r"^(\w+) = \w+BackendConfig\(", lines, re.MULTILINE) == ["here", "cluster"]
    assert re.findall(r".*\bhere\b.*", lines)[1:] == ["client = QLoRAClient(here)"]
