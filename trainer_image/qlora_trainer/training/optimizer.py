"""The optimizer, its learning rate at each step, and its state for checkpoints."""

import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from bitsandbytes.optim import PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.utils import sync_gpu
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qlora_api.spec.resolved import ResolvedTraining

BETAS = (0.9, 0.999)
EPSILON = 1e-8
PAGING_NEEDS_GPU = "paging needs a GPU: the optimizer state stays in main memory"
logger = logging.getLogger(__name__)
# A constant of bitsandbytes, the same for every parameter: not worth a checkpoint's space.
_CONSTANTS = ("qmap1", "qmap2")
_STEP = "step"


class _WaitingOnce(Optimizer2State):
    """bitsandbytes' optimizer, but for its wait after each of hundreds of tensors: one is enough.

    The GPU takes prefetches and updates in their order, as all of them are on the default stream.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter that has a gradient, and wait for the last, since the host reads paged state."""
        updated: list[nn.Parameter] = []
        for number, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, number, index)
                updated.append(parameter)
        if updated:
            sync_gpu(updated[-1])
        # bitsandbytes writes around PyTorch, which would call copies of the weights current (model.kernels).
        increment_version(updated)


class _PagedAdamW32bit(_WaitingOnce, PagedAdamW32bit):
    """With its state in 32 bit."""


class _PagedAdamW8bit(_WaitingOnce, PagedAdamW8bit):
    """With its state in 8 bit."""


_CLASSES = {
    "adamw": torch.optim.AdamW,
    "paged_adamw_32bit": _PagedAdamW32bit,
    "paged_adamw_8bit": _PagedAdamW8bit,
}


def make_optimizer(parameters: Iterable[nn.Parameter], training: ResolvedTraining) -> torch.optim.Optimizer:
    """AdamW as `training.optimizer` names it, with β 0.9 and 0.999 (arXiv 2305.14314).

    Paged state is in memory that the driver moves between GPU and host. On a CPU nothing is paged; this is logged.
    """
    trained = list(parameters)
    make = partial(
        _CLASSES[training.optimizer],
        trained,
        lr=training.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=training.weight_decay,
    )
    if training.optimizer == "adamw":
        return make()
    if trained[0].device.type == "cpu":
        logger.warning(PAGING_NEEDS_GPU)
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    return make()


def learning_rate(step: int, total_steps: int, training: ResolvedTraining) -> float:
    """The rate of the optimizer step that is number `step`, counted from 0.

    It rises linearly over `warmupSteps`, starting above 0, and then stays (constant) or falls to 0 at `total_steps`,
    along a line or half a cosine.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if training.scheduler == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * (1.0 - done) if training.scheduler == "linear" else peak * 0.5 * (1.0 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the optimizer's state in main memory, `<parameter>/<entry>`. `step` must have waited."""
    return {
        # Paged state is on the CPU to PyTorch, which would return it without a copy.
        f"{name}/{entry}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for name, parameter in parameters.items()
        for entry, value in optimizer.state.get(parameter, {}).items()
        if entry not in _CONSTANTS
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put saved state back, exactly.

    bitsandbytes' own loading would put paged state into ordinary GPU memory, so a run that fits only by paging would
    fail after a resume. Instead new paged buffers are created, and the saved state is copied into them.
    """
    order = {id(parameter): index for index, parameter in enumerate(optimizer.param_groups[0]["params"])}
    for name, parameter in parameters.items():
        saved = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        if not saved:
            continue
        if not isinstance(optimizer, _WaitingOnce):
            # As PyTorch does: the step count stays in main memory.
            optimizer.state[parameter] = {
                entry: value.clone() if entry == _STEP else value.to(parameter.device, copy=True)
                for entry, value in saved.items()
            }
            continue
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, order[id(parameter)])
        state = optimizer.state[parameter]
        state[_STEP] = int(saved.pop(_STEP))
        for entry, value in saved.items():
            state[entry].copy_(value)
