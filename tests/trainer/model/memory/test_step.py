"""The bytes of a step on tensors without data are those that training allocates."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig

from qlora_trainer.model.adapter.attach import adapter_name, attach_further_adapter
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.memory.backward import backward, gradients
from qlora_trainer.model.memory.device import AMPERE, HOPPER, fake_cuda
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.memory.step import StepBytes, full_batch, joint_step_bytes, step_bytes
from tests.support.families import FAMILIES
from tests.support.models.adapted import adapted
from tests.support.models.sequences import CPU, random_sequence
from tests.support.models.tiny import SHAPE, save_model
from tests.support.resolved import resolved_lora

WIDE = LlamaConfig(**SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4})
BATCH = Batch.from_sequences([random_sequence((128, 128), 1)], CPU)


Count = Callable[[Callable[[Tensor], None]], StepBytes]
"""Counts the bytes of a step with a function that runs its backward pass."""


def with_gradients(model: PeftModel) -> PeftModel:
    """The model with gradients of an earlier micro batch."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return model


def require_same_walk(count: Count, *, tolerance: float = 0.001) -> StepBytes:
    """The walk over the graph and the engine take the same bytes, which are returned."""
    engine = count(Tensor.backward)
    with pytest.MonkeyPatch.context() as patched:
        # As within a backward pass of the engine.
        patched.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        walk = count(backward)
    assert (walk.kept, walk.loss) == (engine.kept, engine.loss)
    assert walk.work == pytest.approx(engine.work, rel=tolerance)
    return engine


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_walk_over_the_graph_frees_the_same_tensors_as_the_engine(
    checkpointing: bool, dropout: float, tmp_path: Path
) -> None:
    """Counted in real training on a CPU."""
    model = with_gradients(adapted(save_model(tmp_path, WIDE), checkpointing=checkpointing, dropout=dropout))
    found = require_same_walk(lambda run_backward: step_bytes(model, BATCH, run_backward))
    assert min(found.kept, found.loss, found.work) > 0


def test_a_joint_pass_of_several_adapters_is_walked_as_the_engine_goes(tmp_path: Path) -> None:
    model = adapted(save_model(tmp_path / "model", WIDE))
    targets = inspect_family(tmp_path / "model", resolved_lora()).target_modules
    names = [adapter_name(position) for position in range(3)]
    for name in names[1:]:
        attach_further_adapter(model, name, resolved_lora(rank=8), targets, seed=1, base_name="", base_revision="")
    with_gradients(model)
    batches = dict(zip(names, (BATCH, BATCH, Batch.from_sequences([random_sequence((64,), 2)], CPU)), strict=True))
    require_same_walk(lambda run_backward: joint_step_bytes(model, batches, run_backward))


def test_pairs_take_the_memory_of_other_rows_with_as_many_tokens(tmp_path: Path) -> None:
    pairs = Batch.from_sequences([replace(random_sequence((128, 128), 1), row_numbers=(0, 1))], CPU)
    model = with_gradients(adapted(save_model(tmp_path, WIDE)))
    supervised = step_bytes(model, BATCH, Tensor.backward)
    compared = require_same_walk(lambda run_backward: step_bytes(model, pairs, run_backward))
    assert compared.kept == supervised.kept
    # Besides the same chunk of logits, a loss for each target instead of one for all.
    assert supervised.loss <= compared.loss <= supervised.loss + 64 * pairs.target_count
    assert compared.work == pytest.approx(supervised.work, rel=0.01)


def test_capped_attention_is_walked_as_the_engine_goes(tmp_path: Path) -> None:
    model = with_gradients(adapted(save_model(tmp_path, FAMILIES["gemma2"][0])))
    require_same_walk(lambda run_backward: step_bytes(model, BATCH, run_backward), tolerance=0)


def attention_peak(capability: tuple[int, int], rows: int, key_heads: int) -> int:
    """Return the peak of attention's backward pass for 640 tokens, with 8 heads of 40."""
    boundaries = RowBoundaries.from_lengths((640 // rows,) * rows, CPU)
    with fake_cuda(capability):
        offsets = torch.empty(boundaries.offsets.shape, dtype=torch.int32, device="cuda")
        on_gpu = RowBoundaries(boundaries.lengths, offsets)
        query, key, value = (
            torch.empty(1, heads, 640, 40, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for heads in (8, key_heads, key_heads)
        )
        output, _ = rows_attention(torch.nn.Module(), query, key, value, None, rows=on_gpu)
        with LiveBytes("cuda") as live:
            gradients(output, [query, key, value], torch.empty_like(output))
            return live.take_peak()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("key_heads", "expanded"), [(8, 0), (2, 2 * 2 * 640 * 8 * 40)])
def test_the_sums_of_flash_attentions_backward_pass_count_while_it_runs(
    key_heads: int, expanded: int, rows: int
) -> None:
    """`mha_varlen_bwd` allocates float32 sums for the tokens, and 128 more a row.

    Each token has sums for heads of 64, and one more.
    """
    flash = expanded + 4 * (640 + 128 * rows) * 8 * (64 + 1)
    # Of one row a Hopper's cuDNN takes 32-bit sums for the next power of two; five would be as long as the longest.
    cudnn = 4 * 1024 * 8 * (40 + 1) if rows == 1 else flash
    assert attention_peak(AMPERE, rows, key_heads) - attention_peak(HOPPER, rows, key_heads) == flash - cudnn


def test_a_full_batch_has_the_shapes_that_a_gpu_is_given() -> None:
    batch = full_batch(3, 100)
    assert batch.input_ids.shape == (1, 384)
    assert batch.rows.lengths == (100, 100, 100, 84)
    assert batch.rows.longest == 256
    assert batch.target_count == 297
    pairs = full_batch(3, 101, pairs=True)
    assert pairs.pairs is not None
    assert pairs.rows.lengths == (51, 50, 51, 50, 51, 50, 81)
    assert (len(pairs.pairs), pairs.pairs.target_counts) == (3, (50, 49) * 3)
