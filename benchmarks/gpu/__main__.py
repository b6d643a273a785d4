"""Compares this trainer with TRL and Unsloth on one GPU, and writes one JSON file and one Markdown table.

All train on the same rows and the same random 8B base. Each run is a process that is alone on the GPU. uv makes
an environment for each other system. A system that cannot be installed or fails is a row with the reason, and the
others continue. `--cpu` tries all of this with a tiny model, without a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.conversations import CHAT, write_conversations
from benchmarks.gpu.card import Card, find_card
from benchmarks.gpu.plan import (
    MICRO_BATCHES,
    MODEL,
    SEQUENCES_PER_STEP,
    SYSTEMS,
    Case,
    Device,
    SystemName,
    Workload,
    interpreter,
    make_plan,
)
from benchmarks.gpu.table import table
from benchmarks.gpu.worker import MEASURED, RUN
from benchmarks.machine import RESULTS, ROOT, describe_machine, write_result
from benchmarks.speed.settings import SEED
from examples.demo.__main__ import model_folder
from qlora_trainer.model.source.hub_config import packaged_config

_IMPORTS: Mapping[SystemName, str] = {"trl": "trl", "trl-flash": "trl, kernels", "unsloth": "unsloth"}
"""What a system's environment must be able to import."""
INSTALL_SECONDS, RUN_SECONDS = 1800, 900
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50_000,
}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> int:
    """Measure, write and print; returns the exit code."""
    options = _parser().parse_args()
    workload = Workload.on("cpu" if options.cpu else "cuda", options.steps)
    uv = os.environ.get("UV") or shutil.which("uv")
    try:
        card = None if options.cpu else find_card()
        pythons = {
            system: interpreter(system, own=sys.executable, uv=uv, root=ROOT, given=dict(options.python))
            for system in options.systems
        }
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result = {
        "card": card and asdict(card),
        "machine": describe_machine(),
        "base": "a tiny Llama" if options.cpu else MODEL,
        "workload": asdict(workload),
        "sequencesPerStep": SEQUENCES_PER_STEP,
        "date": datetime.now(UTC).date().isoformat(),
        "runs": measure(make_plan(options.systems, options.micro_batches), workload, pythons),
    }
    output = options.output or (Path(tempfile.gettempdir()) if options.cpu else RESULTS)
    path = write_result(file_name(card), result, output)
    path.with_suffix(".md").write_text(table(result))
    print(table(result))
    print(path)
    return 0


def file_name(card: Card | None) -> str:
    """Return the name of the result's files: with the card's."""
    return "-".join(["gpu", *("cpu" if card is None else card.name).lower().split()])


def measure(
    plan: Sequence[Case], workload: Workload, pythons: Mapping[SystemName, Sequence[str]]
) -> list[dict[str, Any]]:
    """Run all cases in their order; a run has its measurement, or its `error`."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qlora-gpu-") as scratch:
        folder = Path(scratch)
        model = write_model(folder / "model", workload)
        write_conversations(folder / "train.jsonl", workload.rows, SEED, CHAT)
        lacking = {system: _install(system, python, workload.device) for system, python in pythons.items()}
        for number, case in enumerate(plan, start=1):
            print(f"{case.name}, {number} of {len(plan)}", file=sys.stderr, flush=True)
            reason = lacking[case.system]
            found = {"error": reason} if reason else _run(case, workload, folder, model, pythons[case.system])
            runs.append({"case": asdict(case), **found})
    return runs


def write_model(folder: Path, workload: Workload) -> Path:
    """Write the base with the demo model's tokenizer into a folder, and return it."""
    folder.mkdir()
    for name in _TOKENIZER:
        shutil.copy(model_folder() / name, folder)
    config = packaged_config(MODEL)
    if config is None:
        raise AssertionError(f"the configuration of {MODEL} is packaged")
    # The numbers of its special tokens are the tokenizer's.
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    settings = json.loads(config.read_text()) | tokens | (_TINY if workload.device == "cpu" else {})
    (folder / "config.json").write_text(json.dumps(settings))
    arguments = [str(folder), str(folder), workload.device]
    # Another process, which gives the GPU back.
    subprocess.run([sys.executable, "-m", "benchmarks.gpu.base", *arguments], check=True, cwd=ROOT)
    return folder


def _install(system: SystemName, python: Sequence[str], device: Device) -> str | None:
    """Return why the system's libraries are not there, or None."""
    if system == "ours":
        return None
    print(f"installing {system}", file=sys.stderr, flush=True)
    command = [*python, "-c", f"import {_IMPORTS[system]}"]
    return _failure(command, _environment(system, device), Path(tempfile.gettempdir()), INSTALL_SECONDS)


def _run(case: Case, workload: Workload, inputs: Path, model: Path, python: Sequence[str]) -> dict[str, Any]:
    """Return one run's measurement, or its `error`."""
    folder = inputs / case.name
    folder.mkdir()
    (folder / "train.jsonl").hardlink_to(inputs / "train.jsonl")
    (folder / RUN).write_text(json.dumps({"case": asdict(case), "workload": asdict(workload)}))
    command = [*python, "-m", "benchmarks.gpu.worker", str(folder), str(model)]
    error = _failure(command, _environment(case.system, workload.device), folder, RUN_SECONDS)
    measured: dict[str, Any] = {"error": error} if error else json.loads((folder / MEASURED).read_text())
    # The trainer's workspace has a copy of the base.
    shutil.rmtree(folder)
    return measured


def _environment(system: SystemName, device: Device) -> dict[str, str]:
    # A run takes the first visible GPU. Only the kernels of flash attention come from the Hub.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] if device == "cuda" else ""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": gpu,
        "HF_HUB_OFFLINE": str(int(system != "trl-flash")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def _failure(command: Sequence[str], environment: Mapping[str, str], folder: Path, seconds: float) -> str | None:
    """Run the command in the folder; returns the end of its output if it fails, or None."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr or done.stdout)[-4000:].strip() or f"exit code {done.returncode}"


def _system_and_path(text: str) -> tuple[str, str]:
    system, _, path = text.partition("=")
    if system not in SYSTEMS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not SYSTEM=PATH with one of {', '.join(SYSTEMS)}")
    return system, path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="try it with a tiny model on a CPU")
    parser.add_argument("--steps", type=int, help="timed optimizer steps of each run (default: 14, on a CPU 4)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="only these")
    parser.add_argument(
        "--micro-batches", nargs="+", type=int, choices=MICRO_BATCHES, default=MICRO_BATCHES, help="only these"
    )
    parser.add_argument(
        "--python",
        action="append",
        type=_system_and_path,
        default=[],
        metavar="SYSTEM=PATH",
        help="an interpreter whose environment has the system's libraries; none is made then",
    )
    parser.add_argument("--output", type=Path, help="folder of the result (default: results, on a CPU the temporary)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
