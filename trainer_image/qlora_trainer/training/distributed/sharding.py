"""Shards the 4-bit base over the ranks of a run (FSDP2), for models that do not fit on one GPU.

Each rank keeps a part of every decoder block and gathers a block's whole weights while it computes with them, in the
forward pass and again in the backward pass. Of the embeddings and the output layer it keeps some rows, and nothing is
gathered (see `vocabulary`). Only frozen weights are sharded: the adapter, with modules that are trained whole and their
originals, stays whole in each rank, because bitsandbytes' optimizers take no sharded tensors, and its gradients are
summed as without sharding.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.architecture.vocabulary import spread_vocabulary
from qlora_trainer.model.protocols import AdaptedModel

logger = logging.getLogger(__name__)
STORAGE_DTYPE = torch.bfloat16
"""The storage type of packed weights: that of the norms in FSDP's one buffer."""


def shard_base(model: AdaptedModel, device: torch.device, processes: int) -> None:
    """Shard the frozen base of a model of `attach_adapter` over the ranks, and move the model to `device`.

    The base must be in main memory and checked to be NF4 or FP4. Of a base that is mapped from a file, only this rank's
    part of each weight is read. From then on every rank must run the same number of passes, and the bytes of two blocks
    at most are gathered at a time. Raises StepFailure (BAD_CONFIGURATION) for a block that cannot be.
    """
    mesh = init_device_mesh(device.type, (processes,))
    base = model.get_base_model()
    decoder, held = base.get_decoder(), []
    for number, block in enumerate(decoder_blocks(base)):
        _require_one_dtype(number, block)
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
    constants = [_as_weight(module) for module in block.modules() if isinstance(module, Linear4bit)]
    adapter = {parameter for parameter in block.parameters() if parameter.requires_grad}
    whole = {name: parameter.data for name, parameter in block.named_parameters() if not parameter.requires_grad}
    for name, weight in whole.items():
        _set_frozen(block, name, weight.to("meta"))
    fully_shard(block, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)
    own = 0
    for name, weight in whole.items():
        # The rows that FSDP gives to the rank: as many to each, until there are no more.
        parts, rank = weight.chunk(mesh.size()), mesh.get_local_rank()
        part = (parts[rank] if rank < len(parts) else weight[:0]).to(device, copy=True)
        own += part.nbytes
        shape, stride = weight.shape, weight.stride()
        sharded = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        _set_frozen(block, name, sharded)
    for layer in constants:
        layer.module.quant_state.to(device)
    # FSDP's own hook, which gathers, is the first one. Its buffers are the same at each pass, freed in between.
    block.register_forward_pre_hook(lambda *_: _take_gathered(constants))
    return own, sum(weight.nbytes for weight in whole.values())


@dataclass(frozen=True)
class _Constants:
    """The constants of a 4-bit layer, one for each group of weights, which are sharded as if they were a weight."""

    module: Linear4bit
    count: int
    dtype: torch.dtype


def _take_gathered(constants: Iterable[_Constants]) -> None:
    """Let the layers read the constants that have been gathered."""
    for layer in constants:
        gathered = layer.module.absmax.detach().view(torch.uint8).view(-1).view(layer.dtype)
        layer.module.quant_state.absmax = gathered[: layer.count]


def _as_weight(module: Linear4bit) -> _Constants:
    absmax = module.quant_state.absmax
    data = absmax.view(torch.uint8)
    data = torch.nn.functional.pad(data, (0, data.numel() % STORAGE_DTYPE.itemsize)).view(STORAGE_DTYPE)
    module.register_parameter("absmax", nn.Parameter(data.unsqueeze(1), requires_grad=False))
    module.quant_state.absmax = absmax[:0]
    return _Constants(module, absmax.numel(), absmax.dtype)


def _set_frozen(block: nn.Module, name: str, tensor: Tensor) -> None:
    module, _, last = name.rpartition(".")
    setattr(block.get_submodule(module), last, nn.Parameter(tensor, requires_grad=False))


def _require_one_dtype(number: int, block: nn.Module) -> None:
    for name, module in block.named_modules():
        if isinstance(module, Linear4bit) and not (
            isinstance(module.weight, Params4bit) and module.weight.quant_state is not None
        ):
            raise bad_configuration(f"block {number}: {name} is not 4-bit and cannot be sharded")
    found = {str(parameter.dtype) for parameter in block.parameters() if not parameter.requires_grad}
    if found != {str(STORAGE_DTYPE)}:
        raise bad_configuration(
            f"block {number} holds tensors of {', '.join(sorted(found))} and can only be sharded in {STORAGE_DTYPE}: "
            "set spec.training.sharding to none"
        )
