"""Decides from a model's config.json whether it can be trained with QLoRA, and which of its layers get an adapter."""

from dataclasses import dataclass
from pathlib import Path

from qlora_api.v1alpha1 import LoraSpec


@dataclass(frozen=True)
class Family:
    """What is known about a base model before any of its weights is read."""

    model_type: str
    target_modules: tuple[str, ...]
    """Exact, sorted module names that get an adapter."""
    quantized_fraction: float
    """Of the parameters outside embeddings and head, those in layers that become 4-bit."""
    packing_isolated: bool
    """Whether rows in one sequence cannot see each other: a leak test on a shrunken random model of this family."""


def inspect_family(config_folder: Path, lora: LoraSpec) -> Family:
    """The family of the model whose config.json lies in `config_folder`. Reads no weights and runs none of its code.

    Raises StepFailure: UNSAFE_ARTEFACT for a model that brings its own code; BAD_CONFIGURATION, naming the family,
    for one that QLoRA cannot train here (mixture of experts, already quantized, too few linear layers) and for a
    target module that the model does not have.
    """
    raise NotImplementedError
