"""Runs one measured operation in a separate process, and prints its time and memory as a line of JSON."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.memory import forget_peak, peak_resident_bytes, resident_bytes
from benchmarks.trainer import context_of, train_here

SUBJECTS = ("ours", "bitsandbytes", "copy")
WAYS = ("after", "before")
_SIDE = 4096
"""Rows and columns of the weight that is quantized."""


def main() -> int:
    """Do it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base.worker", description=__doc__)
    tasks = parser.add_subparsers(required=True)
    quantizer = tasks.add_parser("quantize")
    quantizer.add_argument("subject", choices=SUBJECTS)
    quantizer.add_argument("--repetitions", type=int, required=True)
    quantizer.set_defaults(run=lambda options: quantize(options.subject, options.repetitions))
    conversion = tasks.add_parser("convert")
    conversion.add_argument("model", type=Path)
    conversion.add_argument("target", type=Path)
    conversion.add_argument("--nothing", action="store_true", help="load the libraries and read no weights")
    conversion.set_defaults(run=lambda options: convert(options.model, options.target, nothing=options.nothing))
    start = tasks.add_parser("start")
    start.add_argument("folder", type=Path)
    start.add_argument("model", type=Path)
    start.add_argument("way", choices=WAYS)
    start.set_defaults(run=lambda options: train_one_step(options.folder, options.model, options.way))
    options = parser.parse_args()
    options.run(options)
    return 0


def _print(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def quantize(subject: str, repetitions: int) -> None:
    """Measure the bytes of 16 bit quantized per second, and the extra peak memory."""
    import torch

    work = _subject(subject)
    weight = torch.randn(_SIDE, _SIDE, dtype=torch.float32).mul_(0.02).to(torch.bfloat16)
    work(weight)
    forget_peak()
    held, seconds = resident_bytes(), []
    for _ in range(repetitions):
        began = time.perf_counter()
        work(weight)
        seconds.append(time.perf_counter() - began)
    _print(
        {
            "bytesPerSecond": weight.nbytes / statistics.median(seconds),
            "weightBytes": weight.nbytes,
            "aboveBytes": peak_resident_bytes() - held,
            "seconds": seconds,
        }
    )


def _subject(name: str) -> Callable[[Any], Any]:
    if name == "copy":
        return lambda weight: weight.clone()
    if name == "bitsandbytes":
        from bitsandbytes.functional import quantize_4bit

        return lambda weight: quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    from qlora_api.spec.training import QuantizationSpec
    from qlora_trainer.model.nf4.quantization import quantize as ours

    return lambda weight: ours(weight, QuantizationSpec())


def convert(model: Path, target: Path, *, nothing: bool) -> None:
    """Write the base of the model's folder to `target` file by file, as prepare does."""
    from qlora_api.spec.training import QuantizationSpec
    from qlora_trainer.core.filesystem import file_sha256
    from qlora_trainer.model.base.conversion import BaseConversion
    from qlora_trainer.model.base.layout import BaseLayout

    layout = BaseLayout.from_folder(model, QuantizationSpec())
    began = time.monotonic()
    files = [] if nothing else sorted(model.glob("*.safetensors"))
    conversion = BaseConversion(target, model, "benchmark", layout)
    for path in files:
        conversion.convert(path, file_sha256(path))
    if not nothing:
        conversion.complete()
    _print({"seconds": time.monotonic() - began})


class _Unchecked:
    """In place of the check of the base's bytes: the original was not read again."""

    def __init__(self, *_arguments: Any) -> None:
        """Begin nothing."""

    def raise_failure(self) -> None:
        """Find nothing."""

    wait = close = raise_failure


def train_one_step(folder: Path, model: Path, way: str) -> None:
    """Run train to its first step, and "before" load and quantize the original too."""
    context = context_of(folder, model)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from qlora_trainer.model.base.load import load_base
    from qlora_trainer.steps import train
    from qlora_trainer.training import open_run

    found = dict[str, Any]()

    def load(base: Path, *arguments: Any, **settings: Any) -> Any:
        loaded = load_base(base if way == "after" else model, *arguments, **settings)
        found["loaded"] = time.monotonic()
        return loaded

    def end(*_arguments: Any) -> None:
        taken = {"firstStep": time.monotonic(), "readBytes": read_bytes(), "peakBytes": peak_resident_bytes()}
        _print(found | taken)
        os._exit(0)

    register_optimizer_step_post_hook(end)
    with patch.object(open_run, "load_base", load):
        if way == "after":
            train_here(context)
        else:
            with patch.object(train, "BaseCheck", _Unchecked):
                train_here(context)


def read_bytes(lines: Sequence[str] | None = None) -> int:
    """Return the bytes that the process has read from storage (`read_bytes` of Linux)."""
    for line in Path("/proc/self/io").read_text().splitlines() if lines is None else lines:
        name, _, value = line.partition(":")
        if name == "read_bytes":
            return int(value)
    raise LookupError("/proc/self/io has no read_bytes: this kernel does not account for it")


if __name__ == "__main__":
    sys.exit(main())
