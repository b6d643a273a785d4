"""Reads the rows of the table of model families off dry runs: `python -m benchmarks.memory_table [FAMILY ...]`.

A family's block is run at several widths. At each operation of the backward pass what is alive is a sum of multiples of
the widths, which a regression over the widths finds; the row has those sums that are the largest for some widths. It
prints each row as `crds/qlora_api/memory/families.py` has it, and how far the estimate with today's row is off.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, PretrainedConfig

from qlora_api.memory.families import FAMILIES, PerToken
from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.model.architecture.decoder import block_linears
from qlora_trainer.model.families.inspection import Family
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.memory.backward import backward
from qlora_trainer.model.memory.device import fake_batch, fake_cuda, on_fake_cuda
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.memory.skeleton import adapted_skeleton, base_skeleton
from qlora_trainer.model.memory.step import full_batch, step_bytes

TOKENS, RANK, BLOCKS = 1024, 16, 2
_HEADS = 8
_NARROW_HEAD = 64
# Hidden size, head size, heads of keys, size of the MLP: no width follows from the others.
_SHAPES = (
    (1024, 128, 8, 4096),
    (512, 128, 4, 2048),
    (2048, 128, 2, 4096),
    (2048, 64, 8, 8192),
    (1536, 128, 4, 1024),
    (1024, 64, 2, 6144),
    (2048, 96, 4, 2048),
    (1536, 64, 2, 3072),
    (2048, 128, 8, 1024),
    (1024, 128, 2, 8192),
)
_ONE_WIDTH = frozenset({"gpt_neox", "phi", "phi3", "olmo", "olmo2", "olmo3", "smollm3"})
"""Families whose queries are as wide as the hidden state."""
_QUERY = 4
"""Multiple of the query's width where it is not told from the hidden state's: as in Llama."""
# What differs by less between two moments is not worth another row.
_CLOSE = 1.005


@dataclass(frozen=True)
class Widths:
    """Of a block, and the configuration that has them."""

    hidden: int
    query: int
    mlp: int
    key: int
    config: PretrainedConfig


def configurations(model_type: str, blocks: int = BLOCKS) -> Iterator[Widths]:
    """The family with several widths."""
    for hidden, head, key_heads, mlp in _SHAPES:
        one_width = model_type in _ONE_WIDTH
        heads, head_dim = (hidden // _NARROW_HEAD, _NARROW_HEAD) if one_width else (_HEADS, head)
        sizes: dict[str, Any] = {
            "vocab_size": 512,
            "num_hidden_layers": blocks,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "pad_token_id": 2,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }
        if model_type != "gpt_neox":
            sizes["num_key_value_heads"] = key_heads
        if not one_width:
            sizes["head_dim"] = head_dim
        if model_type == "gemma2":
            # Its capped scores are counted apart.
            sizes["attn_logit_softcapping"] = None
        config = AutoConfig.for_model(model_type, **sizes)
        key = hidden if model_type == "gpt_neox" else key_heads * head_dim
        yield Widths(hidden, heads * head_dim, mlp, key, config)


class _Timeline(LiveBytes):
    """The most that was alive at each operation, since `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations.append(self.take_peak())
        return result


def _model(config: PretrainedConfig, *, dropout: float, checkpointing: bool) -> Any:
    training = TrainingSpec(max_sequence_length=TOKENS, gradient_checkpointing=checkpointing)
    linears = block_linears(base_skeleton(config, ATTENTION))
    family = Family(config.model_type, linears, quantized_fraction=1.0, one_row=False)
    return adapted_skeleton(config, family, LoraSpec(rank=RANK, dropout=dropout), training, QuantizationSpec())


def _on_gpu(model: Any) -> None:
    on_fake_cuda(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)


def timeline(config: PretrainedConfig, dropout: float, batch: Batch) -> list[int]:
    """Bytes at each operation of the backward pass with gradient checkpointing, beside the inputs of the blocks."""
    model = _model(config, dropout=dropout, checkpointing=True)
    live = _Timeline()

    def traced(loss: torch.Tensor) -> None:
        live.operations.clear()
        backward(loss)

    with fake_cuda():
        _on_gpu(model)
        step_bytes(model, fake_batch(batch), traced, live)
    # All that a step makes is freed at its end.
    inputs = 2 * BLOCKS * TOKENS * config.hidden_size
    return [size - live.bytes - inputs for size in live.operations]


def kept(config: PretrainedConfig, batch: Batch) -> int:
    """Bytes that the blocks keep without gradient checkpointing, their inputs included."""
    model = _model(config, dropout=0.0, checkpointing=False)
    with fake_cuda():
        _on_gpu(model)
        return step_bytes(model, fake_batch(batch)).kept


def fitted(values: Sequence[Sequence[int]], shapes: Sequence[Widths], one_width: bool) -> NDArray[numpy.float64]:
    """Of each operation the multiples of the widths, [operations, 4]; not a number where a weight is dequantized."""
    hidden, query, mlp, key = (
        numpy.array([getattr(shape, name) for shape in shapes], dtype=float)
        for name in ("hidden", "query", "mlp", "key")
    )
    columns = [hidden, query, mlp, key, hidden * query / TOKENS, hidden * mlp / TOKENS, hidden * key / TOKENS]
    sizes = numpy.array(values, dtype=float) / TOKENS
    fixed = numpy.zeros(len(shapes))
    if one_width:
        fixed = _QUERY * query
        del columns[1]
    columns.append(numpy.ones(len(shapes)))
    found, _, _, _ = numpy.linalg.lstsq(numpy.stack(columns, axis=1), sizes - fixed[:, None], rcond=None)
    multiples = found[:4] if not one_width else numpy.stack([found[0], numpy.full(found.shape[1], _QUERY), *found[1:3]])
    weights = found[4:-1] if not one_width else found[3:-1]
    return numpy.where(numpy.abs(weights).max(axis=0) < 0.5, multiples, numpy.nan).T


def moments(multiples: NDArray[numpy.float64], shapes: Sequence[Widths]) -> list[PerToken]:
    """The fewest of the operations' sums, in whole numbers, of which one is nearly the largest for each shape."""
    whole = {tuple(int(number) for number in numpy.round(row)) for row in multiples if not numpy.isnan(row).any()}
    left, chosen = list(shapes), list[PerToken]()
    candidates = [PerToken(hidden=h, query=q, mlp=m, key=k) for h, q, m, k in whole]
    best = {id(shape): max(_bytes(one, shape) for one in candidates) for shape in shapes}
    while left:
        enough = {
            one: [shape for shape in left if _bytes(one, shape) * _CLOSE >= best[id(shape)]] for one in candidates
        }
        most = max(candidates, key=lambda one: (len(enough[one]), _bytes(one, shapes[0])))
        chosen.append(most)
        left = [shape for shape in left if shape not in enough[most]]
    return chosen


def _bytes(moment: PerToken, shape: Widths) -> int:
    return moment.hidden * shape.hidden + moment.query * shape.query + moment.mlp * shape.mlp + moment.key * shape.key


def row(model_type: str) -> dict[str, list[PerToken]]:
    """The numbers of a family: what a block keeps, and the moments of its backward pass without and with dropout."""
    shapes, batch = list(configurations(model_type)), full_batch(1, TOKENS)
    one_width = model_type in _ONE_WIDTH
    # The first block's input has no gradient, so that less of it is kept: the difference is what any other keeps.
    deeper = configurations(model_type, BLOCKS + 1)
    each = [[kept(deep.config, batch) - kept(shape.config, batch)] for deep, shape in zip(deeper, shapes, strict=True)]
    found = {"kept": moments(fitted(each, shapes, one_width), shapes)}
    for name, dropout in (("backward", 0.0), ("backward_with_dropout", 0.1)):
        timelines = [timeline(shape.config, dropout, batch) for shape in shapes]
        found[name] = moments(fitted(timelines, shapes, one_width), shapes)
    return found


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=sorted(FAMILIES), help="model types; all if none is given")
    for model_type in parser.parse_args().families:
        print(f"{model_type}:")
        for name, numbers in row(model_type).items():
            shown = ", ".join(f"PerToken({one.hidden}, {one.query}, {one.mlp}, {one.key})" for one in numbers)
            print(f"    {name}=({shown})", flush=True)


if __name__ == "__main__":
    main()
