"""Measures several adapters trained together on one base, beside the same adapters one after the other.

Writes `results/together.json`, and its tables into the documentation. One process measures both ways in turn, with the
same batches, so that neither has another machine. The adapters that are trained one after the other are on the same
base, which is loaded before: the time to load it is on neither side. A process of its own for each number of adapters
measures memory. A step is what a step of training is: forward and backward passes, clipping, the optimizer.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import RESULTS, ROOT, describe_machine, write_result
from benchmarks.memory import forget_peak, peak_resident_bytes, release_freed, resident_bytes
from benchmarks.operator import table
from benchmarks.operator.table import head, row
from examples.demo.__main__ import model_folder
from qlora_api.memory.training_shape import RECOMPUTE_ALL
from qlora_trainer.core.cpu import preloaded_allocator

MIB = 2**20
NAME, COMMAND = "together", "benchmarks.together"
"""Of the result, and what measures it."""
TARGET_SPEEDUP, TARGET_MEMORY = 1.5, 0.05


def tables(result: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    lines = head(
        "Tokens of each adapter in a step",
        "Adapters",
        "Together, tokens/s",
        "One by one, tokens/s",
        "",
        f"≥ {TARGET_SPEEDUP} ×",
    )
    for each in result["turns"]:
        tokens = each["adapters"] * each["tokens"]
        together, one_by_one = (tokens / median(each[way]) for way in ("together", "one_by_one"))
        factor = speedup(each)
        lines.append(
            row(
                str(each["tokens"]),
                str(each["adapters"]),
                f"{together:.0f}",
                f"{one_by_one:.0f}",
                f"{factor:.2f} ×",
                _met(factor >= TARGET_SPEEDUP),
            )
        )
    tokens = result["memory"][0]["tokens"]
    lines += [
        "",
        *head(
            f"Adapters, {tokens} tokens of each in a step",
            "Base, MiB",
            "Peak, MiB",
            "Base + adapters × one alone, MiB",
            f"≤ {100 * TARGET_MEMORY:.0f} % above",
        ),
    ]
    alone = result["memory"][0]
    for each in result["memory"]:
        limit = each["base_bytes"] + each["adapters"] * (alone["peak_bytes"] - alone["base_bytes"])
        lines.append(
            row(
                str(each["adapters"]),
                *(f"{bytes_ / MIB:,.0f}" for bytes_ in (each["base_bytes"], each["peak_bytes"], limit)),
                _met(each["peak_bytes"] <= (1 + TARGET_MEMORY) * limit),
            )
        )
    return "\n".join(lines) + "\n"


def speedup(turns: Mapping[str, Any]) -> float:
    """Return the median speedup in tokens per second of training together."""
    return median(alone / both for both, alone in zip(turns["together"], turns["one_by_one"], strict=True))


def _met(met: bool) -> str:
    return "met" if met else "missed"


RANK, ALPHA = 16, 16
ADAPTERS = (1, 2, 4, 8)
TOKENS = (64, 128, 256, 512)
"""Of each adapter's micro batch."""
_TOKEN_IDS = 1000
"""Of the model's vocabulary, so many are in the batches."""
PAGE = ROOT / "docs" / "trainer" / "measurements.md"


@dataclass(frozen=True)
class Turns:
    """Seconds of wall time of each step of all adapters, measured in turn."""

    adapters: int
    tokens: int
    """Of each adapter in a step."""
    together: tuple[float, ...]
    one_by_one: tuple[float, ...]


@dataclass(frozen=True)
class Memory:
    """Resident bytes of a process that trains so many adapters."""

    adapters: int
    tokens: int
    base_bytes: int
    """With the base, before there is an adapter."""
    peak_bytes: int
    """During the steps."""


class _Adapters:
    """The model with so many adapters, and a batch and an optimizer for each."""

    def __init__(self, number: int, tokens: int) -> None:
        import torch

        from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
        from qlora_api.spec.training import QuantizationSpec
        from qlora_trainer.data.prepared import PackedSequence
        from qlora_trainer.model.adapter.attach import (
            activate_adapter,
            adapter_name,
            adapter_parameters,
            attach_adapter,
            attach_further_adapter,
        )
        from qlora_trainer.model.base.load import load_base
        from qlora_trainer.model.families.inspection import inspect_family
        from qlora_trainer.model.losses.batch import Batch
        from qlora_trainer.training.optimizer import make_optimizer

        folder, lora = model_folder(), ResolvedLora(rank=RANK, alpha=ALPHA)
        training = ResolvedTraining(
            optimizer="adamw",
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=2e-4,
            scheduler="constant",
            warmup_steps=0,
            auto_micro_batch=False,
            max_sequence_length=tokens,
        )
        targets = inspect_family(folder, lora).target_modules
        base = load_base(folder, QuantizationSpec(), "cpu")
        # What loading has freed but the allocator still holds would hide what training takes.
        gc.collect()
        release_freed()
        self.base_bytes = resident_bytes()
        self.model = attach_adapter(
            base, lora, targets, seed=0, recomputation=RECOMPUTE_ALL, base_name="model", base_revision="main"
        )
        names = list(map(adapter_name, range(number)))
        for index, name in enumerate(names[1:], start=1):
            attach_further_adapter(self.model, name, lora, targets, seed=index, base_name="model", base_revision="main")
        generator = torch.Generator().manual_seed(0)
        self.batches, self.parameters, self.optimizers = {}, {}, {}
        for name in names:
            activate_adapter(self.model, name)
            input_ids = torch.randint(0, _TOKEN_IDS, (tokens,), generator=generator)
            rows = (tokens // 2, tokens - tokens // 2)
            self.batches[name] = Batch.from_sequences([PackedSequence(input_ids, input_ids, rows)], torch.device("cpu"))
            self.parameters[name] = adapter_parameters(self.model)
            self.optimizers[name] = make_optimizer(self.parameters[name].values(), training)

    def together(self) -> None:
        """A step of all in one pass."""
        self._pass(self.batches)
        for name in self.batches:
            self._apply(name)

    def one_by_one(self) -> None:
        """Time a step of each without a change of the active adapter, as in a job alone."""
        for name, batch in self.batches.items():
            self._pass({name: batch})
            self._apply(name)

    def _pass(self, batches: Mapping[str, Any]) -> None:
        import torch

        from qlora_trainer.model.losses.joint import joint_losses, route

        with route(self.model, batches):
            with _autocast():
                losses = joint_losses(self.model, batches)
            scaled = [loss / batches[name].target_count for name, loss in losses.items()]
            torch.stack(scaled).sum().backward()

    def _apply(self, name: str) -> None:
        from torch import nn

        nn.utils.clip_grad_norm_(self.parameters[name].values(), 0.3)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)


def _autocast() -> Any:
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)


def measure_turns(number: int, tokens: int, steps: int) -> Turns:
    """Steps in turn, after one of each that pays for what is made once."""
    adapters = _Adapters(number, tokens)
    ways: dict[Callable[[], None], list[float]] = {adapters.one_by_one: [], adapters.together: []}
    for step in range(steps + 1):
        for way, seconds in ways.items() if step % 2 else reversed(ways.items()):
            began = time.monotonic()
            way()
            seconds.append(time.monotonic() - began)
    one_by_one, together = (tuple(round(each, 3) for each in seconds[1:]) for seconds in ways.values())
    return Turns(number, tokens, together, one_by_one)


def measure_memory(number: int, tokens: int, steps: int) -> Memory:
    """The peak of so many steps together."""
    adapters = _Adapters(number, tokens)
    forget_peak()
    for _ in range(steps):
        adapters.together()
    return Memory(number, tokens, adapters.base_bytes, peak_resident_bytes())


_MEASURES: dict[str, Callable[[int, int, int], Any]] = {"turns": measure_turns, "memory": measure_memory}


def _in_a_process(measure: str, number: int, tokens: int, steps: int) -> dict[str, Any]:
    """Return the result of a measure in another process with the allocator of pods."""
    command = [sys.executable, "-m", "benchmarks.together", "--worker", measure, str(number), str(tokens), str(steps)]
    environment = {**os.environ, **preloaded_allocator(os.environ), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result), flush=True)
    return result


def write_tables(result: dict[str, Any]) -> None:
    """Put them into the page of the documentation."""
    table.write(NAME, tables(result), PAGE, COMMAND)


def main() -> None:
    """Measure all, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each way")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    parser.add_argument("--tables", action="store_true", help="only write the tables, of the result that is there")
    parser.add_argument("--worker", nargs=4, metavar=("MEASURE", "ADAPTERS", "TOKENS", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        measure, *numbers = arguments.worker
        print(json.dumps(asdict(_MEASURES[measure](*map(int, numbers)))))
        return
    if arguments.tables:
        write_tables(json.loads((RESULTS / f"{NAME}.json").read_text()))
        return
    result = {
        "machine": describe_machine(),
        "model": "SmolLM2-135M",
        "rank": RANK,
        "turns": [
            _in_a_process("turns", number, tokens, arguments.steps) for tokens in TOKENS for number in ADAPTERS[1:]
        ],
        "memory": [_in_a_process("memory", number, TOKENS[1], 3) for number in ADAPTERS],
    }
    print(write_result(NAME, result, arguments.output))
    if arguments.output == RESULTS:
        write_tables(result)


if __name__ == "__main__":
    main()
