"""Counts the GPU work of a block of the trainer's model, forward and backward. Needs no GPU, and measures no time.

The model is that of the dry run, on fake CUDA tensors, at the published widths. Each figure is the difference between
a model with two equal blocks and one with one, so embeddings, output layer and loss do not count. Writes
`results/kernels.json`, which a test compares with the code, and its table into the documentation.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, PretrainedConfig

from benchmarks.machine import write_result
from benchmarks.operator import table
from benchmarks.operator.table import head, row
from benchmarks.together import PAGE
from qlora_api.schema import replace
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.adapter.attach import adapter_name, attach_further_adapter
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.memory.device import fake_batch
from qlora_trainer.model.memory.measure import trained_on_fake_cuda
from qlora_trainer.model.memory.skeleton import adapted_skeleton
from qlora_trainer.model.memory.step import StepBytes, full_batch, joint_step_bytes, step_bytes
from qlora_trainer.model.source.hub_config import packaged_config

NAME, COMMAND = "kernels", "benchmarks.kernels"
TOKENS, ROWS = 2048, 4
LORA = ResolvedLora(rank=16, alpha=16)
_MATMULS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm")
# A vocabulary of any size has the same blocks.
_VOCABULARY = 1024


@dataclass(frozen=True)
class Case:
    """A block of a model, and how it is trained."""

    block: str
    model: str
    """Of the Hub, with a packaged config.json, or a type of transformers, at its default sizes."""
    kind: str | None = None
    """Its entry in the configuration's `layer_types`."""
    gpu_gib: float = 24
    recomputed: bool = False
    jobs: int = 1
    """Equal ones in one pod, each with its part of the tokens."""
    dropout: float = 0.0
    """Of the adapter."""


CASES = (
    Case("Llama 3.1 8B", "meta-llama/Llama-3.1-8B-Instruct"),
    Case("Llama 3.1 8B, LoRA dropout", "meta-llama/Llama-3.1-8B-Instruct", dropout=0.05),
    Case("Llama 3.1 8B, recomputed", "meta-llama/Llama-3.1-8B-Instruct", recomputed=True),
    Case("Llama 3.1 8B, recomputed, 8 jobs", "meta-llama/Llama-3.1-8B-Instruct", recomputed=True, jobs=8),
    Case("Gemma 3 12B, sliding window", "google/gemma-3-12b-it", "sliding_attention"),
    Case("Qwen3-30B-A3B, experts one by one", "Qwen/Qwen3-30B-A3B"),
    Case("Qwen3-30B-A3B, experts one by one, recomputed", "Qwen/Qwen3-30B-A3B", recomputed=True),
    Case("Qwen3-30B-A3B, experts together", "Qwen/Qwen3-30B-A3B", gpu_gib=80),
    Case("Qwen3-30B-A3B, experts together, recomputed", "Qwen/Qwen3-30B-A3B", gpu_gib=80, recomputed=True),
    Case("gpt-oss-20b, experts one by one", "openai/gpt-oss-20b", "sliding_attention"),
    Case("gpt-oss-20b, experts together", "openai/gpt-oss-20b", "sliding_attention", gpu_gib=80),
    Case("Qwen 3.5, linear attention", "qwen3_5_text", "linear_attention"),
    Case("Qwen 3.5, linear attention, recomputed", "qwen3_5_text", "linear_attention", recomputed=True),
)


@dataclass(frozen=True)
class Figures:
    """The GPU work of a block, forward and backward."""

    operations: int
    """Those that write memory: views and allocations launch no kernel."""
    matmuls: int
    """Of these, without attention."""
    waits: int
    """Copies between main memory and GPU that the host waits for."""
    moved_bytes: int
    """Sum of the inputs and outputs of each operation."""
    peak_bytes: int
    """Kept by the block for its backward pass, and the most while one block is at work."""


class Launches(TorchDispatchMode):
    """Counts the operations on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.matmuls = self.waits = self.moved_bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        # `out` is only written, and returned.
        given = _tensors((args, {name: value for name, value in (kwargs or {}).items() if name != "out"}))
        result = func(*args, **(kwargs or {}))
        made, name = _tensors(result), func._schema.name.partition("::")[2]
        devices = {tensor.device.type for tensor in given + made}
        if "cuda" not in devices or not _writes(func, name, given, made):
            return result
        self.operations += 1
        self.matmuls += name in _MATMULS
        is_copy = name in ("_to_copy", "copy_") and len(devices) > 1
        self.waits += is_copy and not _is_asynchronous(func, args, kwargs or {})
        self.moved_bytes += sum(tensor.nbytes for tensor in given + made)
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _writes(func: OpOverload, name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> bool:
    if "empty" in name:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    return func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in storages for tensor in made)


def _is_asynchronous(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return bool({**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking"))


def count(case: Case) -> Figures:
    """Return the figures of a block."""
    (one, its_bytes), (two, bytes_of_two) = (_run(case, blocks) for blocks in (1, 2))
    return Figures(
        two.operations - one.operations,
        two.matmuls - one.matmuls,
        two.waits - one.waits,
        two.moved_bytes - one.moved_bytes,
        bytes_of_two.kept - its_bytes.kept + its_bytes.work,
    )


def _run(case: Case, blocks: int) -> tuple[Launches, StepBytes]:
    """Run a micro batch of the model with so many blocks."""
    config, family = _inspect(case.model, case.kind)
    _set_blocks(config, case.kind, blocks)
    rows = case.jobs if case.jobs > 1 else 1 if family.one_row else ROWS
    training = ResolvedTraining(
        micro_batch_size=rows,
        max_sequence_length=TOKENS // rows,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        scheduler="constant",
        warmup_steps=0,
        auto_micro_batch=False,
        gradient_checkpointing=case.recomputed,
    )
    lora = replace(LORA, dropout=case.dropout)
    model = adapted_skeleton(config, family, lora, training, QuantizationSpec())
    jobs = [adapter_name(position) for position in range(case.jobs)]
    for name in jobs[1:]:
        with torch.device("meta"):
            attach_further_adapter(model, name, lora, family.target_modules, seed=0, base_name="", base_revision="")
    batch = full_batch(rows // case.jobs, TOKENS // rows)
    with trained_on_fake_cuda(model, case.gpu_gib), Launches() as launches:
        batches = {name: fake_batch(batch) for name in jobs}
        return launches, joint_step_bytes(model, batches) if case.jobs > 1 else step_bytes(model, batches[jobs[0]])


@cache
def _inspect(model: str, kind: str | None) -> tuple[PretrainedConfig, Family]:
    """Return a model's configuration with two blocks of a kind, and its inspection, which holds for one too."""
    packaged = packaged_config(model)
    config = AutoConfig.for_model(model) if packaged is None else AutoConfig.from_pretrained(packaged)
    _set_blocks(config, kind, 2)
    config.get_text_config(decoder=True).vocab_size = _VOCABULARY
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return AutoConfig.from_pretrained(folder), inspect_family(Path(folder), LORA)


def _set_blocks(config: PretrainedConfig, kind: str | None, blocks: int) -> None:
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = blocks
    if kind is not None:
        text.layer_types = [kind] * blocks


def tables(result: Mapping[str, Mapping[str, int]]) -> str:
    """The table in Markdown."""
    lines = head("Block", "Operations", "Matmuls", "Waits of the host", "MB moved", "Peak, MB")
    for block, figures in result.items():
        found = Figures(**figures)
        counts = (found.operations, found.matmuls, found.waits)
        sizes = (round(size / 1e6) for size in (found.moved_bytes, found.peak_bytes))
        lines.append(row(block, *(f"{figure:,}" for figure in (*counts, *sizes))))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count all, and write the result and its table."""
    argparse.ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__).parse_args()
    result = {case.block: asdict(count(case)) for case in CASES}
    write_result(NAME, result)
    table.write(NAME, tables(result), PAGE, COMMAND)
    print(tables(result), end="")


if __name__ == "__main__":
    main()
