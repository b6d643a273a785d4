"""Counts the bytes of the tensors that are alive."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_trainer.model.memory.kernel_workspaces import workspace_bytes


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, until they are freed, and keeps the largest sum.

    Of what kernels need inside, it counts the part in `kernel_workspaces`. The CUDA context and the allocator's
    fragmentation are not in it.
    """

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

    def take_peak(self) -> int:
        """The largest sum since this was called last."""
        peak, self.peak = self.peak, self.bytes
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.peak = max(self.peak, self.bytes + workspace_bytes(func, args, kwargs or {}))
        return result
