"""On a GPU every family uses the fast kernels, and no 32-bit multiplication."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from qlora_trainer.data.prepared import PackedSequence
from qlora_trainer.model.adapter.attach import adapter_parameters
from qlora_trainer.model.kernels import attention
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.memory.backward import backward, gradients, nodes
from qlora_trainer.model.memory.device import AMPERE, HOPPER, fake_batch, fake_cuda, on_fake_cuda
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from tests.support.families import CASES, FAMILIES
from tests.support.models.adapted import adapted
from tests.support.models.sequences import CPU, random_sequence
from tests.support.models.tiny import SHAPE, save_model

BLOCKS = SHAPE["num_hidden_layers"]
KERNEL, KERNEL_BACKWARD = "torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"
MATMULS = ("aten.mm.", "aten.addmm", "aten.bmm.", "aten.baddbmm")
FUSED = ("torch_attn._varlen_attn", "aten._scaled_dot_product_flash", "aten._scaled_dot_product_efficient")
# Capped, with sinks, or with a bias or a type of the model: transformers computes them so, too.
ALL_SCORES = frozenset(
    {
        "bloom",
        "gpt_neo",
        "granitemoe_swa",
        "hy_v4",
        "mimo_v2_flash",
        "mpt",
        "vaultgemma",
        "xglm",
    }
)
"""Families whose attention is no kernel: all scores of a row are kept in memory until they are used."""
DELTA_RULE = frozenset({"olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""Families with linear attention that the trainer computes."""
NO_ATTENTION = frozenset({"granitemoehybrid", "mamba2"})
"""As transformers configures them by default."""
ALIKE = (256, 256, 256)
SEQUENCES = [random_sequence((40, 30, 58), 1), random_sequence((72,), 2)]


class Operations(TorchDispatchMode):
    """Counts the operations that are run, each with the type of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if tensors:
            self.counts[str(func), tensors[0].dtype] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *prefixes: str) -> dict[tuple[str, torch.dtype], int]:
        """Those whose names begin so."""
        return {key: count for key, count in self.counts.items() if key[0].startswith(prefixes)}


class Step:
    """One micro batch of a tiny model on a GPU without data, forward and backward."""

    def __init__(
        self,
        config: PretrainedConfig,
        folder: Path,
        capability: tuple[int, int] = AMPERE,
        sequences: Sequence[PackedSequence] = SEQUENCES,
    ) -> None:
        model = adapted(save_model(folder, config))
        batch = Batch.from_sequences(sequences, torch.device("meta"))
        self.inputs: list[torch.dtype] = []
        for name, _module in model.named_modules():
            if name.endswith(".lora_A"):
                layer = model.get_submodule(name.removesuffix(".lora_A"))
                layer.register_forward_pre_hook(lambda _layer, given: self.inputs.append(given[0].dtype))
        with fake_cuda(capability):
            on_fake_cuda(model)
            with Operations() as self.forward, torch.autocast("cuda", dtype=BASE_DTYPE, cache_enabled=False):
                loss = batch_loss(model.get_base_model(), fake_batch(batch))
            self.nodes = Counter(type(node).__name__ for node in nodes(loss))
            with Operations() as self.backward:
                backward(loss)
            self.trained = adapter_parameters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_and_adapted_layer_takes_the_16_bit_kernel(family: str, tmp_path: Path) -> None:
    config, layers = FAMILIES[family]
    step = Step(config, tmp_path / "model")

    adapted_layers = BLOCKS * len(layers.split())
    assert len(step.trained) == 2 * adapted_layers
    assert all(p.grad is not None and p.grad.shape == p.shape for p in step.trained.values())
    # Each is recomputed for backward.
    assert step.inputs == [torch.bfloat16] * 2 * adapted_layers
    assert (step.nodes["_LoraMatmulBackward"], step.nodes["MatMul4BitBackward"]) == (adapted_layers, 0)
    multiplied = step.forward.of(*MATMULS) | step.backward.of(*MATMULS)
    assert {dtype for _, dtype in multiplied} == {torch.bfloat16}
    kernels = (step.forward.of(KERNEL), step.backward.of(KERNEL), step.backward.of(KERNEL_BACKWARD))
    # PyTorch's kernel has no cap of scores.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    expected = [{}] * 3 if capped else [{(name, torch.bfloat16): BLOCKS} for name in (KERNEL, KERNEL, KERNEL_BACKWARD)]
    assert list(kernels) == expected
    assert not step.forward.of("aten._scaled_dot_product", "aten._softmax") or capped


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in FAMILIES])
def test_every_other_family_multiplies_in_16_bit_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    step = Step(case.config(), tmp_path / "model", sequences=SEQUENCES[1:] if case.one_row else SEQUENCES)

    assert all(p.grad is not None and p.grad.shape == p.shape for p in step.trained.values())
    # A layer that is used several times in a block has one adapter.
    assert step.nodes["_LoraMatmulBackward"] >= len(step.trained) // 2
    in_32_bit = {operation for operation, dtype in step.forward.of(*MATMULS) if dtype == torch.float32}
    # Routers compute as in use, and states are in 32 bit.
    allowed = {"aten.mm.default"} if case.experts else set()
    allowed |= {"aten.bmm.default", "aten.bmm.out", "aten.baddbmm_.default"} if name in DELTA_RULE else set()
    assert in_32_bit <= allowed or name in ALL_SCORES
    kernels = {dtype for _, dtype in step.forward.of(*FUSED)}
    assert kernels == (set() if name in ALL_SCORES | NO_ATTENTION else {torch.bfloat16})
    assert case.experts or name in ALL_SCORES or not step.forward.of("aten._softmax", "aten._safe_softmax")


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
def test_a_head_size_that_no_kernel_takes_is_padded_to_one_that_it_takes(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes: list[int] = []

    def kernel(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        sizes.append(query.shape[-1])
        return varlen_attn(query, *arguments, **settings)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    step = Step(LlamaConfig(**SHAPE | {"head_dim": 100}), tmp_path / "model", capability)

    assert set(sizes) == {104}
    assert step.forward.of(KERNEL) == {(KERNEL, torch.bfloat16): BLOCKS}
    assert step.backward.of(KERNEL_BACKWARD) == {(KERNEL_BACKWARD, torch.bfloat16): BLOCKS}


@pytest.mark.parametrize(
    ("capability", "changes", "lengths", "rows"),
    [
        (AMPERE, {}, ALIKE, 3),
        (HOPPER, {}, ALIKE, 4),
        # Attention that cuDNN does not compute.
        (HOPPER, {"head_dim": 256}, ALIKE, 3),
        (HOPPER, {"sliding_window": 16}, ALIKE, 3),
        # It would take the memory of four rows of 512 tokens.
        (HOPPER, {}, (512, 128, 128), 3),
    ],
    ids=["ampere", "hopper", "large heads", "window", "one long row"],
)
def test_only_cudnn_is_given_rows_without_tokens(
    capability: tuple[int, int],
    changes: dict[str, Any],
    lengths: tuple[int, ...],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Only cuDNN needs few numbers of rows. FlashAttention takes memory for each row.

    cuDNN takes the memory of rows that are all as long as the longest, so it computes rows of like lengths only.
    """
    offsets: list[tuple[int, bool]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, of_queries: Tensor, of_keys: Tensor, *others: Any) -> Any:
        # Of two tensors cuDNN is not chosen.
        offsets.append((len(of_queries) - 1, of_queries is of_keys))
        return select_backend(query, key, value, of_queries, of_keys, *others)

    select_backend = varlen._select_backend
    with monkeypatch.context() as patched:
        patched.setattr(varlen, "_select_backend", kernel)
        config = MistralConfig(**SHAPE | {"sliding_window": None} | changes)
        step = Step(config, tmp_path / "model", capability, [random_sequence(lengths, 1)])

    # The trainer asks which kernel it will be, and PyTorch then takes it.
    assert set(offsets[1::2]) == {(rows, rows == 4)}
    assert step.backward.of(KERNEL_BACKWARD) == {(KERNEL_BACKWARD, torch.bfloat16): BLOCKS}


@pytest.mark.parametrize(
    ("numbers", "view", "taken"),
    [
        (512, lambda memory: memory.view(1, 8, 4, 16).transpose(1, 2), True),
        (512, lambda memory: memory.view(1, 4, 8, 16), True),
        (1024, lambda memory: memory.view(1, 8, 8, 16)[:, :, 4:].transpose(1, 2), False),
        (513, lambda memory: memory[1:].view(1, 4, 8, 16), False),
        (128, lambda memory: memory.view(1, 1, 8, 16).expand(1, 4, 8, 16), False),
        (512, lambda memory: memory.view(1, 4, 16, 8).mT, False),
    ],
    ids=["by token", "by head", "a part", "not aligned", "shared", "transposed"],
)
def test_heads_are_copied_only_if_a_kernel_cannot_read_them_where_they_are(
    numbers: int, view: Callable[[Tensor], Tensor], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []

    def kernel(query: Tensor, *arguments: Any, **settings: Any) -> Tensor:
        given.append(query)
        return varlen_attn(query, *arguments, **settings)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with fake_cuda():
        memory = torch.empty(numbers, dtype=torch.bfloat16, device="cuda")
        heads = view(memory)
        attention.rows_attention(torch.nn.Module(), heads, heads, heads, None)

    (query,) = given
    assert (query.untyped_storage()._cdata == memory.untyped_storage()._cdata) is taken
    assert query.shape == (8, 4, 16)
    assert query.stride(2) == 1
    assert taken or query.is_contiguous()


def test_the_walk_over_the_graph_gives_the_gradients_of_the_engine(tmp_path: Path) -> None:
    """On tensors with data, with checkpointing, functions of ours and of PyTorch."""
    model = adapted(save_model(tmp_path / "model", FAMILIES["qwen3"][0]))
    trained = adapter_parameters(model)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=BASE_DTYPE, cache_enabled=False):
            return batch_loss(model.get_base_model(), Batch.from_sequences(SEQUENCES, CPU))

    expected = torch.autograd.grad(loss(), list(trained.values()))
    # As within a backward pass of the engine.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch._C, "_current_graph_task_id", lambda: 1)
        found = gradients(loss(), list(trained.values()))
        backward(loss())

    for parameter, one, other in zip(trained.values(), found, expected, strict=True):
        assert one is not None
        assert one.dtype == other.dtype
        # Sums of gradients in 16 bit are rounded, and the engine may add in another order.
        assert float((one - other).norm() / other.norm()) < 2**-6
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, one)


def test_the_walk_fits_gradients_to_their_tensors(tmp_path: Path) -> None:
    """As the engine: summed over broadcast dimensions, in the tensor's type, or None."""
    x = torch.randn(3, 1, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    loss = (x.bfloat16() * torch.randn(3, 5)).float().sum() + x.sum()

    expected = torch.autograd.grad(loss, [x, unused], allow_unused=True, retain_graph=True)
    found = gradients(loss, [x, unused])

    assert found[1] is expected[1] is None
    assert found[0] is not None
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0])
