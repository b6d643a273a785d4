"""Counts the weights of a dense model and of its adapter.

The inputs are the sizes in `config.json` and the job's settings.
"""

from dataclasses import dataclass

from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import ALL_LINEAR, TrainingShape

SMALLEST_PAGED_TENSOR = 100_000
"""Parameters. bitsandbytes keeps the state of smaller tensors in ordinary device memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCounts:
    """The parts of a model and its adapter, whatever the training data."""

    blocks: int
    quantized_parameters: int
    """In 4-bit layers."""
    unquantized_bytes: int
    """Of frozen weights that are not in 4-bit."""
    adapter_parameters: int
    pageable_parameters: int
    """Those of the adapter in tensors that are large enough to be paged."""
    whole_parameters: int
    """Of modules that are trained whole."""
    vocabulary_bytes: int = 0
    """The part of `unquantized_bytes` that sharding divides: embeddings and output layer, unless trained whole."""
    mxfp4_parameters: int = 0
    """Of experts in MXFP4."""
    two_blocks: float | None = None
    """The largest share of the 4-bit weights in two blocks that follow one another; None if all blocks are equal."""

    @property
    def parameters(self) -> int:
        """Of the model, without its adapter."""
        return self.quantized_parameters + self.mxfp4_parameters + self.unquantized_bytes // 2


def count_weights(model: ModelShape, training: TrainingShape) -> WeightCounts:
    """Count a job's weights, without norms and biases, below 0.05 % of the parameters.

    Raises ValueError for target modules that the model does not have.
    """
    shapes = [model.projections[name] for name in adapted_linears(model, training.target_modules)]
    tensors = [training.rank * features for shape in shapes for features in shape]
    if training.use_dora:
        tensors += [outputs for _, outputs in shapes]
    whole_parameters = len(training.whole_modules) * model.vocab_size * model.hidden_size
    layers = min(training.adapted_layers or model.num_hidden_layers, model.num_hidden_layers)
    return WeightCounts(
        blocks=model.num_hidden_layers,
        quantized_parameters=model.linear_parameters,
        unquantized_bytes=2 * model.embedding_parameters,
        adapter_parameters=layers * sum(tensors),
        pageable_parameters=layers * sum(size for size in tensors if size >= SMALLEST_PAGED_TENSOR),
        whole_parameters=whole_parameters,
        vocabulary_bytes=2 * (model.embedding_parameters - whole_parameters),
    )


def adapted_linears(model: ModelShape, targets: frozenset[str]) -> frozenset[str]:
    """Return the names of a block's layers that get an adapter. Raises ValueError for a target without one."""
    linears = frozenset(model.projections)
    if targets == ALL_LINEAR:
        return linears
    if not targets or targets - linears:
        found = ", ".join(sorted(targets - linears)) or "empty"
        raise ValueError(
            f"target_modules is {found}: must be for a {model.model_type} all-linear, or some of "
            f"{', '.join(sorted(linears))}"
        )
    return targets
