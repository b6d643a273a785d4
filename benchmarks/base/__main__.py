"""Measures the creation of the 4-bit base and its savings; writes `results/base.json` and a table of the documentation.

Each measurement runs in a separate process. Before each start of the train step the kernel is asked to drop the
model's files from its cache, so that they are read from disk.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.base.worker import SUBJECTS
from benchmarks.conversations import CHAT, write_conversations
from benchmarks.data import watch
from benchmarks.machine import RESULTS, describe_machine, write_result
from benchmarks.operator import table
from benchmarks.operator.table import head, row
from benchmarks.speed.settings import ALPHA, MAX_LENGTH, RANK, SEED
from benchmarks.trainer import WORKSPACE, prepare_command
from examples.demo.__main__ import model_folder
from qlora_trainer.core.cpu import preloaded_allocator
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE

MIB, MB, GB = 2**20, 10**6, 10**9
NAME, COMMAND = "base", "benchmarks.base"
"""Name of the result, and its command."""
NAMES = {
    "ours": "In pieces, as `prepare` does",
    "bitsandbytes": "bitsandbytes, the whole weight",
    "copy": "A plain copy",
}
WAYS = {
    "before": "The train step quantizes the original",
    "after": "The train step maps the base that `prepare` made",
}


def figures(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of the repetitions, and memory above that of the libraries alone."""
    return {
        "quantizer": {
            name: {
                "bytesPerSecond": found["bytesPerSecond"],
                "timesTheWeight": found["aboveBytes"] / found["weightBytes"],
            }
            for name, found in measured["quantizer"].items()
        },
        "bases": [
            {
                "name": each["name"],
                "parameters": each["parameters"],
                "originalBytes": each["originalBytes"],
                "baseBytes": each["baseBytes"],
                "seconds": each["seconds"],
                "aboveLibrariesBytes": each["peakAnonymousBytes"] - each["librariesBytes"],
                "peakBytes": each["peakBytes"],
            }
            for each in measured["bases"]
        ],
        "start": {way: _medians(runs) for way, runs in measured["start"].items()},
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = ("secondsToLoaded", "secondsToFirstStep", "readBytes", "peakBytes")
    return {name: median(run[name] for run in runs) for name in names}


def tables(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    found = result["figures"]
    lines = head("Quantizing a weight of 4096 × 4096", "MB/s of 16-bit weights", "Memory besides, × the weight")
    for name, label in NAMES.items():
        each = found["quantizer"][name]
        lines.append(row(label, f"{each['bytesPerSecond'] / MB:,.0f}", f"{each['timesTheWeight']:.1f}"))
    lines += ["", *head("Making a whole base", "16 bit, GB", "Base, GB", "Seconds", "Memory above the libraries, MiB")]
    for each in found["bases"]:
        lines.append(
            row(
                f"{each['name']}, {each['parameters'] / GB:.2f}B",
                f"{each['originalBytes'] / GB:.2f}",
                f"{each['baseBytes'] / GB:.2f}",
                f"{each['seconds']:.0f}",
                f"{each['aboveLibrariesBytes'] / MIB:,.0f}",
            )
        )
    columns = ("Seconds until it is loaded", "Until the first optimizer step", "Read from disk, MiB", "Peak, MiB")
    lines += ["", *head(f"SmolLM2-135M, files not in memory, {result['repetitions']} starts each", *columns)]
    for way, label in WAYS.items():
        each = found["start"][way]
        lines.append(
            row(
                label,
                f"{each['secondsToLoaded']:.1f}",
                f"{each['secondsToFirstStep']:.1f}",
                f"{each['readBytes'] / MIB:,.0f}",
                f"{each['peakBytes'] / MIB:,.0f}",
            )
        )
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[2] / "docs" / "trainer" / "measurements.md"
ROWS = 40
FILE_BYTES = 2**29
"""Of a random model's files: a file of the original is what prepare holds on disk."""
RANDOM_BLOCKS = [4, 16]
"""Blocks of further models: random Llamas with the widths of one of 3B."""
_WIDTHS = {
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def main() -> int:
    """Measure, write and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3, help="starts of each kind (default: %(default)s)")
    parser.add_argument(
        "--blocks", type=int, nargs="*", default=RANDOM_BLOCKS, help="blocks of random models (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    machine, model = describe_machine(), model_folder()
    with tempfile.TemporaryDirectory(prefix="qlora-base-") as scratch:
        folder = Path(scratch)
        measured = {
            "quantizer": {name: _quantizer(name, options.repetitions) for name in SUBJECTS},
            "bases": _bases(folder, model, options.blocks),
            "start": _starts(folder, model, options.repetitions),
        }
    result = {
        "machine": machine,
        "repetitions": options.repetitions,
        "measured": measured,
        "figures": figures(measured),
    }
    print(tables(result))
    print(write_result(NAME, result, options.output))
    if options.output == RESULTS:
        table.write(NAME, tables(result), PAGE, COMMAND)
    return 0


def _worker(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.base.worker", *arguments]


def _printed(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _quantizer(subject: str, repetitions: int) -> dict[str, Any]:
    print(f"quantizing: {subject}", file=sys.stderr, flush=True)
    return _printed(_worker("quantize", subject, "--repetitions", str(4 * repetitions + 1)), dict(os.environ))


def _bases(folder: Path, model: Path, blocks: list[int]) -> list[dict[str, Any]]:
    measured = [_base("SmolLM2", model, folder)]
    for count in blocks:
        random = folder / "random"
        _write_random_model(random, count)
        measured.append(_base(f"Llama 3.2 3B with {count} of its 28 blocks", random, folder))
        for path in random.iterdir():
            path.unlink()
    return measured


def _base(name: str, model: Path, folder: Path) -> dict[str, Any]:
    print(f"making the base of {name}", file=sys.stderr, flush=True)
    target, output = folder / "base", folder / "output"
    with output.open("w") as file:
        libraries = watch(_worker("convert", "--nothing", str(model), str(target)), file)
        watched = watch(_worker("convert", str(model), str(target)), file)
    original, made = ([path.stat().st_size for path in of.glob("*.safetensors")] for of in (model, target))
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    return {
        "name": name,
        "parameters": sum(original) // 2,
        "originalBytes": sum(original),
        "baseBytes": sum(made),
        "seconds": json.loads(output.read_text().splitlines()[-1])["seconds"],
        "peakBytes": watched.peak_bytes,
        "peakAnonymousBytes": watched.peak_anonymous_bytes,
        "librariesBytes": libraries.peak_anonymous_bytes,
    }


def _write_random_model(folder: Path, blocks: int) -> None:
    """Write a Llama of `blocks` blocks with random weights, and no tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**_WIDTHS, num_hidden_layers=blocks)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    weight_map, waiting = dict[str, str](), dict[str, Any]()
    for name, shape in shapes.items():
        waiting[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        if sum(tensor.nbytes for tensor in waiting.values()) >= FILE_BYTES or name == list(shapes)[-1]:
            file = f"model-{len(set(weight_map.values()))}.safetensors"
            save_file(waiting, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(waiting, file)
            waiting = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _starts(folder: Path, model: Path, repetitions: int) -> dict[str, list[dict[str, float]]]:
    """Time and memory of each start of the train step, each way in turn."""
    write_conversations(folder / "train.jsonl", ROWS, SEED, CHAT)
    training = {
        "maxSteps": 1,
        "gradientAccumulationSteps": 1,
        "maxSequenceLength": MAX_LENGTH,
        "trainOn": "all",
        "samples": 0,
    }
    environment = {**os.environ, "QLORA_DEVICE": "cpu"}
    command = prepare_command(folder, model, training, {"rank": RANK, "alpha": ALPHA})
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(repetitions):
        for way, found in runs.items():
            print(f"starting: {way}", file=sys.stderr, flush=True)
            for path in (*model.glob("*.safetensors"), *(folder / WORKSPACE / "base").glob("*.safetensors")):
                forget_content(path)
            # Each start is ended after a step, and too many such attempts of one job would be rejected.
            (folder / WORKSPACE / "records" / ATTEMPTS_FILE).unlink(missing_ok=True)
            began = time.monotonic()
            printed = _printed(
                _worker("start", str(folder), str(model), way), environment | preloaded_allocator(environment)
            )
            found.append(
                {
                    "secondsToLoaded": printed["loaded"] - began,
                    "secondsToFirstStep": printed["firstStep"] - began,
                    "readBytes": printed["readBytes"],
                    "peakBytes": printed["peakBytes"],
                }
            )
    return runs


def forget_content(path: Path) -> None:
    """Ask the kernel to drop the file's content from main memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    sys.exit(main())
