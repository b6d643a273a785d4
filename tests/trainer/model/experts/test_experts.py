"""Routed experts compute in 4-bit as transformers' own with the dequantized weights, for any class."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear, rms_norm, silu
from transformers.integrations.moe import use_experts_implementation

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.experts import compute as experts
from qlora_trainer.model.experts.compute import EXPERTS, register_experts
from qlora_trainer.model.experts.stack import ExpertStack
from qlora_trainer.model.memory.backward import backward
from qlora_trainer.model.memory.device import fake_cuda, on_fake_cuda
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.nf4.quantization import quantize

EXPERT_COUNT, HIDDEN, INNER, TOKENS, CHOICES = 6, 64, 96, 40, 2
KINDS = [QuantizationSpec(), QuantizationSpec(double_quant=False), QuantizationSpec(type="fp4")]
NF4 = QuantizationSpec()


def filled(weight: Tensor, pieces: int = 1, quantization: QuantizationSpec = NF4) -> ExpertStack:
    """A stack of these weights [experts, rows, columns]."""
    stack = ExpertStack((weight.shape[0], weight.shape[1], weight.shape[2]), pieces, quantization, "cpu")
    for expert, whole in enumerate(weight):
        for piece, matrix in enumerate(whole.chunk(pieces)):
            stack.put(expert, piece, quantize(matrix, quantization))
    return stack


def values(layer: Any, quantization: QuantizationSpec) -> Tensor:
    """Return a bitsandbytes layer's weights: table values times block constants."""
    packed, state = layer
    absmax = state.absmax
    if quantization.double_quant:
        outer = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
        absmax = state.state2.code[absmax.int()] * outer + state.offset
    numbers = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).int()
    return (state.code[numbers] * absmax.repeat_interleave(64)).view(state.shape).bfloat16()


# 33,280 weights of an expert have 520 constants: the third block of constants ends before its 256.
@pytest.mark.parametrize(("rows", "columns", "pieces"), [(130, 256, 1), (128, 32, 2), (64, 96, 2)])
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: f"{spec.type}-{spec.double_quant}")
def test_each_matrix_matches_bitsandbytes_and_one_expert_matches_the_whole(
    spec: QuantizationSpec, rows: int, columns: int, pieces: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, rows, columns).bfloat16()
    stack = filled(weight, pieces, spec)

    whole = stack.dense(0, 5, torch.bfloat16)
    for expert in range(5):
        expected = [
            values(
                quantize_4bit(
                    piece.contiguous(),
                    blocksize=64,
                    compress_statistics=spec.double_quant,
                    quant_type=spec.type,
                ),
                spec,
            )
            for piece in weight[expert].chunk(pieces)
        ]
        # Two correct roundings to 16 bit may differ in the last bit.
        assert torch.allclose(whole[expert], torch.cat(expected), rtol=2**-7, atol=0)
        assert torch.equal(stack.dense(expert, expert + 1, torch.bfloat16)[0], whole[expert])
    assert torch.equal(stack.dense(1, 4, torch.float32), whole[1:4].float())
    assert stack.bytes == stack.expected_bytes


def test_large_experts_take_4_127_bits_a_weight() -> None:
    stack = ExpertStack((128, 1536, 2048), 2, NF4, "meta")

    assert 8 * stack.expected_bytes / stack.parameters_count == pytest.approx(4.127, abs=5e-4)
    assert stack.expected_bytes == sum(buffer.nbytes for buffer in stack.buffers())


def test_a_matrix_that_ends_inside_a_block_or_has_another_form_is_rejected() -> None:
    with pytest.raises(ValueError, match="blocks of 64"):
        ExpertStack((4, 10, 10), 1, NF4, "cpu")
    stack = ExpertStack((4, 64, 64), 1, NF4, "cpu")
    with pytest.raises(ValueError, match="fp4"):
        stack.put(0, 0, quantize(torch.randn(64, 64), QuantizationSpec(type="fp4")))
    with pytest.raises(ValueError, match=r"32, 128.*64, 64"):
        stack.put(0, 0, quantize(torch.randn(32, 128), NF4))


def experts_class(*, gate: bool, bias: bool, transposed: bool, norm: bool) -> Any:
    """Define experts as a family does. Transformers' interface adds the rest."""

    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERT_COUNT, silu
            width = 2 * INNER if gate else INNER
            shapes = {"gate_up_proj" if gate else "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, INNER)}
            for name, (outputs, inputs) in shapes.items():
                shape = (inputs, outputs) if transposed else (outputs, inputs)
                stack = filled(
                    0.2 * torch.randn(EXPERT_COUNT, *shape), 1 if transposed or name != "gate_up_proj" else 2
                )
                setattr(self, name, stack)
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERT_COUNT, outputs), requires_grad=False))

        def post_expert_norm(self, states: Tensor) -> Tensor:
            return rms_norm(states, (HIDDEN,))

        def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            """Token by token, by the definition."""
            names = ("gate_up_proj" if gate else "up_proj", "down_proj")
            self.whole = {name: getattr(self, name).dense(0, EXPERT_COUNT, states.dtype) for name in names}
            return torch.stack(
                [
                    sum((self.one(token, int(e)) * w for e, w in zip(es, ws, strict=True)), torch.zeros(()))
                    for token, es, ws in zip(states, chosen, weights, strict=True)
                ]
            ).to(states.dtype)

        def one(self, token: Tensor, expert: int) -> Tensor:
            inner = self.product(token, "gate_up_proj" if gate else "up_proj", expert)
            inner = self._apply_gate(inner) if gate else silu(inner)
            output = self.product(inner, "down_proj", expert)
            return self.post_expert_norm(output) if norm else output

        def product(self, token: Tensor, name: str, expert: int) -> Tensor:
            weight = self.whole[name][expert]
            shift = getattr(self, f"{name}_bias")[expert].to(token.dtype) if bias else None
            return linear(token, weight.T if transposed else weight, shift)

    decorate = use_experts_implementation(
        has_gate=gate, has_bias=bias, is_transposed=transposed, has_post_expert_norm=norm
    )
    return decorate(Experts)


def routed(states: Tensor, of: int = EXPERT_COUNT) -> tuple[Tensor, Tensor]:
    """Two experts out of the first `of` for each token, with their weights."""
    weights, chosen = torch.rand(len(states), of).topk(CHOICES, dim=1)
    return chosen, weights.to(states.dtype)


def result_and_gradients(module: Any, implementation: str, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    module.config._experts_implementation = implementation
    states, weights = (tensor.clone().requires_grad_() for tensor in (given[0], given[2]))
    output = module(states, given[1], weights)
    (output.float() * torch.linspace(-1, 1, HIDDEN)).square().sum().backward()
    return [output.detach(), *(tensor.grad for tensor in (states, weights) if tensor.grad is not None)]


def made(**kind: bool) -> Any:
    register_experts()
    torch.manual_seed(0)
    return experts_class(**{"gate": True, "bias": False, "transposed": False, "norm": False} | kind)(
        SimpleNamespace(_experts_implementation="eager")
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("gate", "bias", "transposed", "norm"), list(product([True, False], repeat=4)))
def test_results_and_gradients_are_those_of_the_definition(
    gate: bool, bias: bool, transposed: bool, norm: bool, dtype: torch.dtype, tolerance: float
) -> None:
    module = made(gate=gate, bias=bias, transposed=transposed, norm=norm)
    states = torch.randn(TOKENS, HIDDEN).to(dtype)
    given = (states, *routed(states))

    expected = result_and_gradients(module, "eager", given)
    found = result_and_gradients(module, EXPERTS, given)

    assert len(found) == len(expected) == 3
    for tensor, wanted in zip(found, expected, strict=True):
        assert tensor.dtype == dtype
        assert float((tensor - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_autocast_computes_in_16_bit() -> None:
    module = made()
    states = torch.randn(TOKENS, HIDDEN)
    given = (states, *routed(states))
    expected = result_and_gradients(module, "eager", given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = result_and_gradients(module, EXPERTS, given)

    assert [tensor.dtype for tensor in found] == [torch.float32] * 3
    for tensor, wanted in zip(found, expected, strict=True):
        error = float((tensor - wanted).abs().max() / wanted.abs().max())
        assert 1e-4 < error < 3e-2


def test_without_the_grouped_kernel_only_chosen_experts_are_dequantized_and_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = made()
    states = torch.randn(TOKENS, HIDDEN)
    chosen, weights = routed(states, of=5)
    chosen[chosen == 1] = 0
    asked: list[tuple[int, int]] = []
    dense = ExpertStack.dense

    def noted(stack: ExpertStack, first: int, end: int, dtype: torch.dtype) -> Tensor:
        if stack is module.down_proj:
            asked.append((first, end))
        return dense(stack, first, end, dtype)

    expected = result_and_gradients(module, EXPERTS, (states, chosen, weights))
    monkeypatch.setattr(ExpertStack, "dense", noted)
    result_and_gradients(module, EXPERTS, (states, chosen, weights))
    assert asked == [(0, 1), (2, 5)] * 2
    asked.clear()
    monkeypatch.setattr(experts, "DENSE_BYTES", 2 * HIDDEN * INNER * 4)
    found = result_and_gradients(module, EXPERTS, (states, chosen, weights))

    assert asked == [(0, 1), (2, 4), (4, 5)] * 2
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [{}, {"bias": True, "transposed": True}, {"gate": False}], ids=str)
def test_all_experts_together_give_the_bits_of_one_after_the_other(
    kind: dict[str, bool], dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with experts that no token chooses."""
    module = made(**kind)
    states = torch.randn(tokens, HIDDEN).to(dtype)
    given = (states, *routed(states, of=3))
    expected = result_and_gradients(module, EXPERTS, given)
    grouped = multiply_together(monkeypatch)

    found = result_and_gradients(module, EXPERTS, given)

    assert all(map(torch.equal, found, expected))
    # Two weights, forward and backward.
    assert grouped == [EXPERT_COUNT] * 4


def multiply_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiply all experts together on a CPU too. Returns the list of each product's groups."""
    groups: list[int] = []

    def noted(rows: Tensor, weights: Tensor, *, offs: Tensor) -> Tensor:
        groups.append(len(offs))
        return grouped_mm(rows, weights, offs=offs)

    monkeypatch.setattr(experts, "_multiplies_together", lambda *_: True)
    monkeypatch.setattr(experts, "grouped_mm", noted)
    return groups


@pytest.mark.parametrize(
    ("dtype", "shape", "has_kernel", "together"),
    [
        (torch.bfloat16, (32, 5760, 2880), True, True),
        (torch.bfloat16, (32, 5760, 2880), False, False),
        (torch.float16, (32, 5760, 2880), True, False),
        (torch.bfloat16, (32, 5760, 2884), True, False),
        (torch.bfloat16, (128, 5760, 2880), True, False),
    ],
    ids=["kernel", "no kernel", "type", "width", "size"],
)
def test_experts_are_multiplied_together_where_the_kernel_takes_them(
    dtype: torch.dtype, shape: tuple[int, ...], has_kernel: bool, together: bool
) -> None:
    with fake_cuda(groups_experts=has_kernel):
        weight = torch.empty(shape, dtype=dtype, device="cuda")
        assert experts._multiplies_together([weight], dtype, weight.device) is together


@pytest.mark.parametrize(
    ("major", "gib", "expected"),
    [(8, 80, False), (9, 80, True), (9, 40, False), (10, 180, True), (12, 96, False)],
    ids=["A100", "H100", "a part of an H100", "B200", "RTX PRO 6000"],
)
def test_gpus_with_the_grouped_kernel_and_memory_for_it_are_found(
    major: int, gib: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=major, total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert experts.has_grouped_kernel(torch.device("cuda")) is expected
    assert not experts.has_grouped_kernel(torch.device("cpu"))


def test_no_dequantized_weight_is_kept_for_the_backward_pass() -> None:
    module = made()
    module.config._experts_implementation = EXPERTS
    states = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(states, *routed(states))

    assert kept
    assert max(tensor.untyped_storage().nbytes() for tensor in kept) == TOKENS * CHOICES * 2 * INNER * 4


EVENLY = torch.arange(24).view(12, 2) % EXPERT_COUNT
TO_THE_SAME = torch.tensor([[0, 1]] * 12)


def most_bytes(module: Any, states: Tensor, chosen: Tensor, run_backward: Callable[[Tensor], None]) -> int:
    """Return the peak bytes of live tensors in both passes, besides the arguments."""
    module.config._experts_implementation = EXPERTS
    weights = torch.ones(chosen.shape, dtype=states.dtype, device=states.device)
    with LiveBytes(states.device.type) as live:
        for tensor in (states, chosen, weights, *module.buffers()):
            live.add(tensor)
        before = live.bytes
        run_backward(module(states, chosen, weights).sum())
    return live.peak - before


@pytest.mark.parametrize("chosen", [EVENLY, TO_THE_SAME], ids=["evenly", "to the same"])
def test_a_dry_run_counts_the_experts_that_are_dequantized_at_a_time(
    chosen: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where experts are multiplied apart, it counts the memory of an even spread, which no routing exceeds."""
    expert_bytes = 2 * INNER * HIDDEN * 2
    counted = {}
    for number in (1, 3):
        module = made()
        monkeypatch.setattr(experts, "DENSE_BYTES", number * expert_bytes)
        states = torch.randn(len(chosen), HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        real = most_bytes(module, states, chosen, Tensor.backward)
        with fake_cuda():
            on_fake_cuda(module)
            states = torch.empty(len(chosen), HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            without_data = torch.empty(chosen.shape, dtype=torch.int64, device="cuda")
            counted[number] = most_bytes(module, states, without_data, backward)
        if chosen is EVENLY:
            assert real == pytest.approx(counted[number], rel=0.02)
        else:
            assert real <= counted[number]
    assert counted[3] - counted[1] == pytest.approx(2 * expert_bytes, rel=0.05)


def test_a_dry_run_counts_all_experts_where_they_are_multiplied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads no tensor: one without data raises an error where a GPU would be waited for."""
    module = made()
    states = torch.randn(len(EVENLY), HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with monkeypatch.context() as patched:
        grouped = multiply_together(patched)
        real = most_bytes(module, states, TO_THE_SAME, Tensor.backward)
        assert grouped
    counted = {}
    for together in (True, False):
        module = made()
        monkeypatch.setattr(experts, "DENSE_BYTES", 1)
        with fake_cuda(groups_experts=together):
            on_fake_cuda(module)
            states = torch.empty(len(EVENLY), HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            chosen = torch.empty(EVENLY.shape, dtype=torch.int64, device="cuda")
            counted[together] = most_bytes(module, states, chosen, backward)
    assert real == pytest.approx(counted[True], rel=0.02)
    assert counted[True] - counted[False] == pytest.approx((EXPERT_COUNT - 1) * 2 * INNER * HIDDEN * 2, rel=0.1)
