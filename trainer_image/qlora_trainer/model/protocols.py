"""The parts of PyTorch's, transformers' and PEFT's models that the trainer uses."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig


class Network(Protocol):
    """A tree of modules, as `torch.nn.Module` is one."""

    def modules(self) -> Iterator[nn.Module]:
        """The network and all modules in it."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The same with their paths. That of the network is empty."""

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules directly in it, by name."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module with this path. Raises AttributeError without one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, each once."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their paths."""

    def buffers(self) -> Iterator[Tensor]:
        """All buffers, each once."""

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The same with their paths."""

    def eval(self) -> Self:
        """Switch to evaluation mode."""

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or to evaluation mode."""


class Decoder(Network, Protocol):
    """A causal language model of transformers. Its layers may have an adapter."""

    @property
    def config(self) -> PretrainedConfig:
        """The configuration, with that of the text decoder inside if multimodal."""

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings of generation, such as the tokens that end it."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""

    def get_decoder(self) -> nn.Module:
        """The text decoder, without the head."""

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of tokens."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The head, or None without one."""

    def activation_checkpointing_enable(self, settings: Mapping[str, object], /, *, offload: bool) -> None:
        """Keep only the inputs of blocks, and compute the rest again for backward."""

    def activation_checkpointing_disable(self) -> None:
        """Keep what backward needs."""

    def set_attn_implementation(self, name: str, /) -> None:
        """Compute attention by the function that is registered under the name."""


class AdaptedModel(Network, Protocol):
    """A decoder with one or more LoRA adapters: PEFT's model."""

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the decoder."""

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that is active."""

    @property
    def peft_config(self) -> Mapping[str, LoraConfig]:
        """The configuration of each adapter, by its name."""

    def get_base_model(self) -> Decoder:
        """The decoder, with the adapters' layers in it."""

    def add_adapter(self, name: str, config: LoraConfig, *, autocast_adapter_dtype: bool) -> None:
        """Add an adapter. Its tensors are found by its name."""

    def set_adapter(self, name: str) -> None:
        """Activate one adapter, which alone gets gradients."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """In the body the model computes as without adapters."""

    def generate(self, **settings: object) -> Tensor:
        """Token ids of prompts and answers, int64 [rows, tokens], by transformers' settings."""


class AutogradContext(Protocol):
    """The context of a `torch.autograd.Function`."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of `save_for_backward`."""

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """Whether each of the arguments of forward needs a gradient."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep these arguments or results for backward."""

    def mark_non_differentiable(self, *results: Tensor) -> None:
        """Results that get no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Whether a gradient that does not exist is given as zeros, not as None."""
