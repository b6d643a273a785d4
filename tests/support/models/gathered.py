"""Notes the gathered parts of a sharded base in a rank: whole blocks, and bytes."""

import json
import os
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_LOOKS = 1000
_SECONDS_BETWEEN_LOOKS = 0.01


def note_gathered(notes: Path) -> None:
    """Note each gathering of this process's train step as JSON lines in `NOTES-RANK` (see `Gathered`)."""
    from qlora_trainer.training import open_run
    from qlora_trainer.training.distributed.sharding import shard_base

    def sharded(model: Any, *arguments: Any) -> None:
        shard_base(model, *arguments)
        Gathered(model.get_base_model().get_decoder(), Path(f"{notes}-{os.environ.get('RANK', '0')}"))

    vars(open_run)["shard_base"] = sharded


class Gathered:
    """Observes a decoder whose blocks are sharded.

    A line has the moment (`gather`: a block's buffer has been allocated; `layer`: a linear layer begins; `forward` and
    `backward`: a pass has ended), `grad`: whether it is for training, `blocks`: how many are whole, `bytes`: of the
    whole blocks' weights and of the buffers, `block`: the bytes of the largest block, `held`: of what blocks keep, the
    adapter left out, and `all`: of all blocks.
    """

    def __init__(self, decoder: Any, path: Path) -> None:
        self._blocks: Sequence[nn.Module] = decoder.layers
        self._path = path
        self._largest = max(map(_whole_bytes, self._blocks))
        self._buffers: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for block in self._blocks:
            assert isinstance(block, FSDPModule)
            block.set_custom_all_gather(_AllGather(self._allocate))
            for module in block.modules():
                if isinstance(module, Linear4bit):
                    module.register_forward_pre_hook(lambda *_: self._note("layer"))
        decoder.register_forward_hook(lambda *_: self._note("forward"))
        backward = torch.Tensor.backward

        def noted_backward(loss: Tensor, *arguments: Any, **settings: Any) -> None:
            backward(loss, *arguments, **settings)
            self._note("backward")

        torch.Tensor.backward = noted_backward

    def _allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = torch.empty(*size, dtype=dtype, device=device)
        # The tensor itself is replaced by views of it.
        self._buffers.add(buffer.untyped_storage())
        self._note("gather")
        return buffer

    def _note(self, moment: str) -> None:
        whole = [block for block in self._blocks if _is_whole(block)]
        line = {"moment": moment, "grad": torch.is_grad_enabled(), "blocks": len(whole)}
        line |= {"held": sum(map(_held_bytes, self._blocks)), "all": sum(map(_whole_bytes, self._blocks))}
        # A thread of gloo's lets go of a buffer a moment after all has arrived in it.
        for _ in range(_LOOKS):
            gathered = sum(map(_whole_bytes, whole)) + sum(storage.nbytes() for storage in self._buffers)
            if gathered <= 2 * self._largest:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "bytes": gathered, "block": self._largest}) + "\n")


class _AllGather:
    """FSDP's gathering, but for the allocation of the buffer."""

    def __init__(self, allocate: Callable[[Sequence[int], torch.dtype, torch.device], Tensor]) -> None:
        self._allocate = allocate

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._allocate(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        return torch.distributed.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


def _frozen(block: nn.Module) -> list[Tensor]:
    return [parameter for parameter in block.parameters() if not parameter.requires_grad]


def _is_whole(block: nn.Module) -> bool:
    """Whether the block's weights are gathered: only then FSDP registers them."""
    return not any(isinstance(parameter, DTensor) for parameter in _frozen(block))


def _whole_bytes(block: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in _frozen(block))


def _held_bytes(block: nn.Module) -> int:
    """The bytes of the memory behind weights and buffers."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in _frozen(block)]
    storages = {storage.data_ptr(): storage for storage in map(Tensor.untyped_storage, [*local, *block.buffers()])}
    return sum(storage.nbytes() for storage in storages.values())
