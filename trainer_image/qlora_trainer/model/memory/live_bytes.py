"""Counts the bytes of the tensors that are alive, and of what PyTorch's kernels allocate inside.

FlashAttention's sums are not small: 0.5 GB for 8,192 tokens of Llama 3 8B in 82 rows padded to 128; rows without tokens
took 0.1 GB of it. A dry run counts them for one row, because the rows are unknown when it runs. 410 rows then take no
more than one, because the MLP takes more than attention; 820 rows take 0.6 GB more.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROW_MARGIN = 128
"""Tokens between two rows' gradients, so that a kernel's last block fits."""
_BACKWARD: OpOverload = torch.ops.torch_attn._varlen_attn_backward.default
_LARGE_HEADS_BACKWARD: OpOverload = torch.ops.aten._efficient_attention_backward.default
_BACKEND = "backend"


def _workspace_bytes(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """Bytes that an operation has allocated at its end, besides its arguments and results.

    The backward passes of rows are all that is known; of cuDNN's, which has a part of its own, what its frontend takes.
    """
    if func not in (_BACKWARD, _LARGE_HEADS_BACKWARD):
        return 0
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if func is _LARGE_HEADS_BACKWARD:
        query, boundaries = (cast("Tensor", given[name]) for name in ("query", "cu_seqlens_q"))
        # The query's gradient in 32 bit (PyTorch's mem_eff_attention/kernel_backward.h, `workspace_size`).
        return 4 * (len(boundaries) - 1) * cast("int", given["max_seqlen_q"]) * query.shape[2] * query.shape[3]
    # An argument that has its default is not passed.
    backend = given.get(_BACKEND, varlen._FLASH_ATTENTION_BACKEND)
    query, key, boundaries = (cast("Tensor", given[name]) for name in ("query", "key", "cu_seq_q"))
    rows = len(boundaries) - 1
    if backend == varlen._CUDNN_ATTENTION_BACKEND:
        # `dQ_accum` and `softmax_sum` in 32 bit, for rows that are all as long as the longest (NVIDIA's cudnn-frontend,
        # scaled_dot_product_flash_attention.h): PyTorch (cudnn/MHA.cpp) does not name the number of tokens.
        return 4 * rows * cast("int", given["max_q"]) * query.shape[1] * (query.shape[2] + 1)
    return _flash_backward(query, key, rows)


def _flash_backward(query: Tensor, key: Tensor, rows: int) -> int:
    """Bytes for queries [tokens, heads, head size]. Keys may have fewer heads.

    Source: PyTorch's `mha_varlen_bwd` (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp). `dq_accum` and
    `softmax_d` are float32, `dk_expanded` and `dv_expanded` have the type of the keys.
    """
    tokens, heads, size = query.shape
    multiple = 32 if size <= 128 else 64
    rounded = -(-size // multiple) * multiple
    sums = 4 * (tokens + _ROW_MARGIN * rows) * heads * (rounded + 1)
    expanded = 2 * tokens * heads * size * key.element_size()
    return sums + (expanded if key.shape[1] != heads else 0)


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make on a device, until they are freed, and their largest sum.

    It counts the workspace of attention, and neither the CUDA context nor the allocator's fragmentation.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        if tensor.device.type != self._device or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._subtract, size)

    def _subtract(self, size: int) -> None:
        self.bytes -= size

    def take_peak(self) -> int:
        """The largest sum since this was called last."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.peak = max(self.peak, self.bytes + _workspace_bytes(func, args, kwargs or {}))
        return result
