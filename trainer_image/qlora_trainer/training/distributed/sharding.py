"""Shards the 4-bit base over the ranks of a run (FSDP2), for models that do not fit on one GPU.

Each rank keeps a part of every decoder block and gathers a block's whole weights while it computes with them, in the
forward pass and again in the backward pass. Of the embeddings and the output layer it keeps some rows, and nothing is
gathered (see `vocabulary`). Only frozen weights are sharded: the adapter, with modules that are trained whole and their
originals, stays whole in each rank, because bitsandbytes' optimizers take no sharded tensors, and its gradients are
summed as without sharding.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.architecture.vocabulary import spread_vocabulary
from qlora_trainer.model.experts.loading import StoredExperts
from qlora_trainer.model.experts.stack import Stack
from qlora_trainer.model.protocols import AdaptedModel

logger = logging.getLogger(__name__)
STORAGE_DTYPE = torch.bfloat16
"""The storage type of packed weights: that of the norms in FSDP's one buffer. Wider ones, as of routers, stay whole."""


def shard_base(model: AdaptedModel, device: torch.device, processes: int, experts: StoredExperts) -> None:
    """Shard the frozen base of a model of `attach_adapter` over the ranks, and move the model to `device`.

    The base must be in main memory and checked to be NF4 or FP4. Of a base that is mapped from a file, only this rank's
    part of each weight is read. Its `experts` have no data: those of one block at a time are loaded. From then on every
    rank must run the same number of passes, and the bytes of two blocks at most are gathered at a time. Raises
    StepFailure for a block that cannot be (BAD_CONFIGURATION), and as `StoredExperts` does.
    """
    mesh = init_device_mesh(device.type, (processes,))
    base = model.get_base_model()
    decoder, held = base.get_decoder(), []
    for number, block in enumerate(decoder_blocks(base)):
        _require_four_bit(number, block)
        experts.load(base, block, "cpu")
        held.append(_shard_block(block, mesh, device))
    held.append(spread_vocabulary(base, mesh.get_local_rank(), processes, device))
    # A root without other weights: under it the blocks share the streams that gather the next one while
    # one is at work. Each block alone would be a root.
    not_sharded = {parameter for parameter in decoder.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=not_sharded, reshard_after_forward=True)
    for tensor in chain(model.parameters(), model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
        if isinstance(tensor, Params4bit):
            # A layer outside the blocks, as Gemma 3n has one: its constants are no buffers.
            tensor.quant_state.to(device)
    own, whole = (sum(sizes) for sizes in zip(*held, strict=True))
    logger.info("this rank holds %d of %d bytes of the sharded base", own, whole)


def _shard_block(block: nn.Module, mesh: DeviceMesh, device: torch.device) -> tuple[int, int]:
    """Leave this rank's part of each frozen weight in the block, and move it to the device.

    FSDP would move each weight to the device whole before it takes the part of it. Therefore it is given weights
    without data, and their parts afterwards, as when a checkpoint is loaded into a sharded model.
    Returns the bytes of the parts, and of the whole weights.
    """
    layers = [module for module in block.modules() if isinstance(module, Linear4bit)]
    turned = [tensor for module in block.modules() for tensor in _as_weights(module)]
    not_sharded = {
        parameter
        for parameter in block.parameters()
        if parameter.requires_grad or parameter.itemsize > STORAGE_DTYPE.itemsize
    }
    whole = {name: parameter.data for name, parameter in block.named_parameters() if parameter not in not_sharded}
    for name, weight in whole.items():
        _set_frozen(block, name, weight.to("meta"))
    fully_shard(block, mesh=mesh, ignored_params=not_sharded, reshard_after_forward=True)
    own = 0
    for name, weight in whole.items():
        # The rows that FSDP gives to the rank: as many to each, until there are no more.
        parts, rank = weight.chunk(mesh.size()), mesh.get_local_rank()
        part = (parts[rank] if rank < len(parts) else weight[:0]).to(device, copy=True)
        own += part.nbytes
        shape, stride = weight.shape, weight.stride()
        sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        _set_frozen(block, name, sharded)
    for layer in layers:
        layer.quant_state.to(device)
    # FSDP's own hook, which gathers, is the first one. Its buffers are the same at each pass, freed in between.
    block.register_forward_pre_hook(lambda *_: _take_gathered(turned))
    return own, sum(weight.nbytes for weight in whole.values())


@dataclass(frozen=True)
class _Turned:
    """A tensor of 4-bit weights that has become a parameter of a module, to be sharded."""

    module: nn.Module
    holder: QuantState | Stack
    """What computes with the tensor, once it is gathered."""
    name: str
    """Of the tensor, in the holder."""
    shape: torch.Size
    dtype: torch.dtype


def _take_gathered(turned: Iterable[_Turned]) -> None:
    """Let what computes with the tensors read those that have been gathered."""
    for tensor in turned:
        gathered = getattr(tensor.module, _parameter(tensor.name)).detach().view(torch.uint8).view(-1)
        own = gathered[: tensor.shape.numel() * tensor.dtype.itemsize]
        setattr(tensor.holder, tensor.name, own.view(tensor.dtype).view(tensor.shape))


def _as_weights(module: nn.Module) -> Iterator[_Turned]:
    """Turn the constants of a layer, one for each group of weights, and stacked experts into parameters."""
    if isinstance(module, Linear4bit):
        yield _as_weight(module, module.quant_state, "absmax")
    elif isinstance(module, Stack):
        yield from (_as_weight(module, module, name) for name in module.sharded)


def _as_weight(module: nn.Module, holder: QuantState | Stack, name: str) -> _Turned:
    tensor = getattr(holder, name)
    data = tensor.view(-1).view(torch.uint8)
    if left := data.numel() % STORAGE_DTYPE.itemsize:
        data = torch.nn.functional.pad(data, (0, left))
    data = data.view(STORAGE_DTYPE).unsqueeze(1)
    module.register_parameter(_parameter(name), nn.Parameter(data, requires_grad=False))
    # FSDP copies buffers to the device whole.
    setattr(holder, name, tensor.new_empty(0))
    return _Turned(module, holder, name, tensor.shape, tensor.dtype)


def _parameter(name: str) -> str:
    return f"sharded_{name}"


def _set_frozen(block: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(block.get_submodule(module), last, nn.Parameter(tensor, requires_grad=False))


def _require_four_bit(number: int, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, Linear4bit) and not (
            isinstance(module.weight, Params4bit) and module.weight.quant_state is not None
        ):
            raise bad_configuration(f"block {number}: {name} is not 4-bit and cannot be sharded")
