"""NF4 on a GPU: the same codes as on a CPU, and the guarantees for a merge."""

import bitsandbytes.functional as bnb
import torch


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")


def test_a_gpu_and_a_cpu_make_the_same_codes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024, dtype=torch.bfloat16)
    here, there = quantized(weight), quantized(weight.cuda())
    differing = (here[0].view(-1) != there[0].cpu().view(-1)).float().mean()
    # Ties between two codes may be broken differently; anything more would be another quantization.
    assert float(differing) < 1e-3


def test_a_layer_takes_as_many_bytes_as_computed() -> None:
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    packed, state = quantized(weight)
    used = torch.cuda.memory_allocated() - before
    # 4 bits a weight, one byte for 64 of them, four for 256 of those; codes and offset, and the allocator's rounding.
    expected = 4096 * 4096 * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert expected <= used <= expected + 8192
    assert packed.numel() * 2 == weight.numel()
    assert state.nested
