"""Runs one system once, in a separate process, and writes the measurement.

python -m benchmarks.gpu.worker FOLDER MODEL
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Case, Workload
from benchmarks.machine import describe_libraries

RUN, MEASURED = "run.json", "measured.json"
LIBRARIES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "unsloth")


def main() -> None:
    """Train on FOLDER's train.jsonl by its run.json, and write measured.json."""
    folder, model = map(Path, sys.argv[1:])
    run = json.loads((folder / RUN).read_text())
    case, workload = Case(**run["case"]), Workload(**run["workload"])
    measured = _train(case, workload, folder, model) | {"libraries": describe_libraries(LIBRARIES)}
    (folder / MEASURED).write_text(json.dumps(measured))


def _train(case: Case, workload: Workload, folder: Path, model: Path) -> dict[str, Any]:
    # Imported where it runs: the environment of one system lacks the libraries of another.
    if case.system == "ours":
        from benchmarks.gpu import ours

        return ours.train(case, workload, folder, model)
    from benchmarks.gpu import peers

    return peers.train(case, workload, folder, model)


if __name__ == "__main__":
    main()
