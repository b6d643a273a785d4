"""Differences of training on a CPU from a GPU, without overriding the user."""

import pytest

from qlora_api.contract import GPU_LOSS_CHUNK_TOKENS
from qlora_trainer.core import cpu


def test_optimizations_for_a_cpu_are_off_on_a_gpu() -> None:
    assert cpu.matmul_parts(1024, 1024, "cuda") == 1
    assert not cpu.keeps_dequantized("cuda", recomputed=True)
    assert not cpu.copies_mapped_weights("cuda", sharded=False)
    assert not cpu.fuses_attention("cuda")
    assert not cpu.fuses_norms("cuda")


@pytest.mark.parametrize(("tokens", "padded"), [(511, 511), (512, 512), (513, 576), (1000, 1024)])
def test_only_long_batches_are_padded_to_a_multiple(tokens: int, padded: int) -> None:
    assert tokens + cpu.padding(tokens, "cpu") == padded


@pytest.mark.parametrize(("tokens", "padded"), [(1, 128), (128, 128), (1000, 1024)])
def test_on_a_gpu_every_batch_is_padded_to_whole_tiles(tokens: int, padded: int) -> None:
    assert tokens + cpu.padding(tokens, "cuda") == padded


@pytest.mark.parametrize(("tokens", "padded"), [(1, 64), (64, 64), (65, 128)])
def test_every_row_is_padded_for_the_attention_kernel(tokens: int, padded: int) -> None:
    assert cpu.padded_row(tokens) == padded


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(767, 1024, 1), (768, 1024, 2), (1024, 513, 2), (1024, 512, 1), (1025, 1024, 1), (1024, 1025, 1)],
)
def test_only_matmuls_that_onednn_runs_on_one_thread_are_halved(rows: int, columns: int, parts: int) -> None:
    assert cpu.matmul_parts(rows, columns, "cpu") == parts


def test_weights_are_kept_and_copied_only_where_it_saves_time() -> None:
    assert cpu.keeps_dequantized("cpu", recomputed=True)
    assert not cpu.keeps_dequantized("cpu", recomputed=False)
    assert cpu.copies_mapped_weights("cpu", sharded=False)
    assert not cpu.copies_mapped_weights("cpu", sharded=True)


def test_logits_are_computed_in_smaller_chunks_on_a_cpu() -> None:
    assert (cpu.loss_chunk_tokens("cpu"), cpu.loss_chunk_tokens("cuda")) == (128, GPU_LOSS_CHUNK_TOKENS)


def test_library_settings_keep_the_users_values() -> None:
    assert cpu.library_settings({}) == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "GOMP_SPINCOUNT": "20000"}
    assert cpu.library_settings({"OMP_WAIT_POLICY": "active", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}) == {}
    assert cpu.library_settings({"GOMP_SPINCOUNT": "5"}) == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
