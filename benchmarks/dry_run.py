"""Counts the live bytes of one training step without weights, on tensors that have a shape and no data.

It confirms the memory estimate, and describes a model that the estimate does not know. It counts tensors: the CUDA
context, the allocator's fragmentation and what a kernel needs inside are not in it.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.model.adapter import adapter_parameters, attach_adapter
from qlora_trainer.model.attention import RowBoundaries, rows_attention
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.decoder import block_linears
from qlora_trainer.model.four_bit import COMPUTE_DTYPE
from qlora_trainer.model.loss import batch_loss
from qlora_trainer.model.support import resolve_targets

_ATTENTION = "qlora_dry_run"
_LARGEST_HEAD = 256
_BLOCK, _NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class DryRun:
    """Live bytes of a training step on one GPU."""

    resident: int
    """Before the step: weights, and when accumulating gradients; the optimizer's state is in main memory's pages."""
    optimizer: int
    peak: int
    """The most at any moment, the optimizer's state included."""


def dry_run(config: PretrainedConfig, lora: LoraSpec, training: TrainingSpec, quantization: QuantizationSpec) -> DryRun:
    """Run one micro batch, forward and backward, of a model of `config` on tensors without data.

    With gradient accumulation the gradients of an earlier micro batch are there already. Every token is a target and
    all are one row, the worst case. Raises StepFailure for a target module that the model does not have.
    """
    model = _model_without_data(config, lora, training, quantization)
    with FakeTensorMode():
        trained = _give_shapes(model)
        if training.gradient_accumulation_steps > 1:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        batch = _batch(training.micro_batch_size * training.max_sequence_length)
        gc.collect()
        with _LiveBytes() as live:
            for tensor in _tensors(model, batch):
                live.add(tensor)
            resident = live.bytes
            state = [
                torch.empty_like(parameter, dtype=_STATE[training.optimizer]) for parameter in trained for _ in "mv"
            ]
            optimizer = live.bytes - resident
            with _as_on_a_gpu():
                with torch.autocast("cpu", dtype=COMPUTE_DTYPE, cache_enabled=False):
                    loss = batch_loss(model.get_base_model(), batch)
                loss.backward()
            del state
            return DryRun(resident, optimizer, live.peak)


_STATE: Mapping[str, torch.dtype | None] = {
    "paged_adamw_32bit": torch.float32,
    "paged_adamw_8bit": torch.uint8,
    "adamw": None,
}
"""Type of Adam's moments; None is the parameter's own."""


def _model_without_data(
    config: PretrainedConfig, lora: LoraSpec, training: TrainingSpec, quantization: QuantizationSpec
) -> Any:
    """The model with its adapter on the meta device, its linear layers replaced by 4-bit ones."""
    AttentionInterface.register(_ATTENTION, _kernel_attention)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config.get_text_config(decoder=True), dtype=COMPUTE_DTYPE, attn_implementation=_ATTENTION
        )
        targets = resolve_targets(lora.target_modules, block_linears(model))
        _quantize(model, model.get_output_embeddings(), quantization)
        # PEFT asks for this before it makes a layer for 4-bit weights.
        model.is_loaded_in_4bit = True
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return attach_adapter(
            model,
            lora,
            targets,
            seed=training.seed,
            gradient_checkpointing=training.gradient_checkpointing,
            base_name="",
            base_revision="",
        )


class _Linear4bitWithoutData(Linear4bit):
    """bitsandbytes' layer, with its own forward and backward, on a weight that bitsandbytes' parameter cannot hold."""

    def __init__(self, linear: nn.Linear, quantization: QuantizationSpec) -> None:
        # bitsandbytes' own would quantize, which needs data.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.compute_dtype, self.compute_type_is_set = COMPUTE_DTYPE, True
        self.support_avx512bf16_for_cpu = False
        size = linear.weight.numel()
        self.weight = nn.Parameter(torch.empty(-(-size // 2), 1, dtype=torch.uint8), requires_grad=False)
        self.weight.quant_state = self.quant_state = _quant_state(linear, size, quantization)
        self.weight.compress_statistics = quantization.double_quant
        self.weight.quant_type = quantization.type


def _quant_state(linear: nn.Linear, size: int, quantization: QuantizationSpec) -> QuantState:
    blocks = -(-size // _BLOCK)
    nested = None
    if quantization.double_quant:
        nested = QuantState(
            absmax=torch.empty(-(-blocks // _NESTED_BLOCK)),
            blocksize=_NESTED_BLOCK,
            code=torch.empty(_NESTED_BLOCK),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.float32 if nested is None else torch.uint8),
        shape=linear.weight.shape,
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type=quantization.type,
        dtype=COMPUTE_DTYPE,
        offset=None if nested is None else torch.empty(()),
        state2=nested,
    )


def _quantize(module: nn.Module, head: nn.Module, quantization: QuantizationSpec) -> None:
    """Replace what transformers replaces: each exact `nn.Linear` but the output layer."""
    for name, child in module.named_children():
        if type(child) is nn.Linear and child is not head:
            setattr(module, name, _Linear4bitWithoutData(child, quantization))
        else:
            _quantize(child, head, quantization)


def _give_shapes(model: Any) -> list[nn.Parameter]:
    """Put tensors of the active fake mode in the place of those on the meta device. Returns the trained ones."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) not in replaced:
                new = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
                new.__dict__.update(parameter.__dict__)
                replaced[id(parameter)] = new
            if parameter is not None:
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = _like(buffer)
        if isinstance(module, _Linear4bitWithoutData):
            for state in _states(module):
                for name in ("absmax", "code", "offset"):
                    if getattr(state, name) is not None:
                        setattr(state, name, _like(getattr(state, name)))
    return list(adapter_parameters(model).values())


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _states(layer: _Linear4bitWithoutData) -> list[QuantState]:
    outer = layer.quant_state
    return [outer] if outer.state2 is None else [outer, outer.state2]


def _batch(tokens: int) -> Batch:
    ids, positions = torch.empty(1, tokens, dtype=torch.int64), torch.empty(1, tokens, dtype=torch.int64)
    rows = RowBoundaries((tokens,), torch.empty(2, dtype=torch.int32))
    return Batch(
        ids,
        positions,
        rows,
        torch.empty(tokens - 1, dtype=torch.int64),
        torch.empty(tokens - 1, dtype=torch.int64),
        tokens,
    )


def _tensors(model: Any, batch: Batch) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, _Linear4bitWithoutData):
            for state in _states(module):
                yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
    yield from (batch.input_ids, batch.position_ids, batch.rows.offsets, batch.predicting, batch.targets)


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, until they are freed, and keeps the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """PEFT asks whether autocast is on for CUDA, and else computes an adapter's product in the adapter's own type."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _kernel_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    rows: RowBoundaries,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention that runs on a GPU: torch's kernel for rows, where there is one."""
    if softcap is not None or query.shape[-1] > _LARGEST_HEAD:
        return rows_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
            rows=rows,
        )
    longest = max(rows.lengths)
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    parts = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = varlen_attn(
        *parts, rows.offsets, rows.offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=True
    )
    return output.unsqueeze(0), None
