"""The paper's claim on a real GPU: one step of a 65B model at rank 64 and 512 tokens fits 48 GB (arXiv 2305.14314)."""

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from qlora_api.memory.advice import budget
from qlora_api.memory.estimate import TrainingShape, estimate
from qlora_api.memory.model_shape import ModelShape
from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.data.prepared import PackedSequence
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter
from qlora_trainer.model.attention import ATTENTION, register_attention
from qlora_trainer.model.base import COMPUTE_DTYPE, check_quantization
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.support import block_linears
from qlora_trainer.training.optimizer import make_optimizer
from tests.gpu.ballast import Ballast

CARD_BYTES = budget(48)
"""What a GPU of 48 GB offers a process."""
MICRO_BATCHES = 2
"""Of a step: from the second one on, gradients lie beside the activations, as in any accumulation."""
LLAMA_65B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=22_016,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=64,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)


def random_base(config: LlamaConfig, device: str) -> Any:
    """A model with random 4-bit weights, made a layer at a time on its device: 130 GB in 16 bit never exist."""
    register_attention()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantization)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            values = torch.empty(module.out_features, module.in_features, dtype=torch.bfloat16, device=device)
            values.normal_(std=0.02)
            module.weight = Params4bit(
                values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
            ).to(device)
            module.support_avx512bf16_for_cpu = False
            continue
        for name, parameter in module.named_parameters(recurse=False):
            filled = torch.ones if parameter.ndim == 1 else torch.zeros
            value = filled(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.ndim > 1:
                value.normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    decoder = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
    # PEFT asks for this before it makes its layer for 4-bit weights.
    model.is_loaded_in_4bit = True
    return model.eval()


def two_steps(config: LlamaConfig, device: str) -> int:
    """Train a random base for two steps as the trainer does; returns the bytes of the paged optimizer state.

    That is memory which PyTorch's allocator does not count.
    """
    base = random_base(config, device)
    check_quantization(base, QuantizationSpec())
    model = attach_adapter(
        base,
        LoraSpec(),
        block_linears(base),
        seed=0,
        gradient_checkpointing=True,
        base_name="random/65b",
        base_revision="none",
    )
    optimizer = make_optimizer(adapter_parameters(model).values(), TrainingSpec())
    tokens = torch.randint(config.vocab_size, (512,))
    labels = tokens.clone()
    labels[0] = -100
    batch = Batch.of([PackedSequence(tokens, labels, (512,))], torch.device(device))
    for _ in range(2):
        for _ in range(MICRO_BATCHES):
            with torch.autocast(device, dtype=COMPUTE_DTYPE, cache_enabled=False):
                loss = batch_loss(model.get_base_model(), batch) / (MICRO_BATCHES * batch.target_count)
            loss.backward()
            assert bool(torch.isfinite(loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    return sum(entry.nbytes for entry in entries if getattr(entry, "is_paged", False))


@pytest.mark.gpu(gib=44)
def test_65b_at_rank_64_fits_48_gb_and_the_estimate_knows_it() -> None:
    free, total = torch.cuda.mem_get_info()
    # What is not free belongs to CUDA's context, on the smaller GPU too.
    with Ballast(free=CARD_BYTES - (total - free)) as ballast:
        torch.cuda.reset_peak_memory_stats()
        paged = two_steps(LLAMA_65B, "cuda")
        peak = torch.cuda.max_memory_allocated() - ballast.bytes
    memory = estimate(ModelShape.from_config(LLAMA_65B.to_dict()), TrainingShape())
    assert paged == memory.pageable_optimizer
    needed = memory.context + peak + paged
    assert needed == pytest.approx(memory.expected, rel=0.05)
    assert needed <= CARD_BYTES
