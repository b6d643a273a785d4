"""The bytes that a dry run has counted, as a completion record keeps them."""

from pydantic import Field

from qlora_api.schema import ObservedModel
from qlora_api.status import Bytes, Count


class MeasuredStep(ObservedModel):
    """Bytes of one micro batch, beyond weights and gradients."""

    sequences: Count = Field(description="Sequences in the micro batch.")
    sequence_tokens: Count = Field(description="Tokens of each.")
    gradient_checkpointing: bool
    kept: Bytes = Field(description="Kept by the decoder for the backward pass when the loss is computed.")
    loss: Bytes = Field(description="The most while the loss is computed, without what is kept.")
    work: Bytes = Field(description="The most while the decoder runs, forward or backward, without what is kept.")
    blocks: tuple[Bytes, ...] = Field((), description="Of what is kept, that of each block; empty if not known.")

    @property
    def tokens(self) -> int:
        """Tokens of the micro batch."""
        return self.sequences * self.sequence_tokens


class MeasuredMemory(ObservedModel):
    """The parts of a job's model, and the bytes that its steps take."""

    digest: str = Field(description="SHA-256 of everything that the numbers depend on.")
    blocks: Count = Field(description="Blocks of the decoder.")
    rank: Count = Field(description="The adapter's rank.")
    quantized_parameters: Count = Field(description="Weights in 4-bit layers.")
    mxfp4_parameters: Count = Field(0, description="Weights of experts in MXFP4.")
    two_blocks: float | None = Field(None, description="The largest share of 4-bit weights in two successive blocks.")
    unquantized_bytes: Bytes = Field(description="Frozen weights that are not in 4-bit.")
    vocabulary_bytes: Bytes = Field(0, description="Those of the embeddings and the output layer that are sharded.")
    adapter_parameters: Count = Field(description="Weights of the adapter.")
    pageable_parameters: Count = Field(description="Those in tensors that are large enough to be paged.")
    whole_parameters: Count = Field(description="Weights of modules that are trained whole.")
    answer_bytes_per_token: Bytes = Field(0, description="Keys and values of a token that is answered with or to.")
    answer_bytes_per_pair: Bytes = Field(0, description="Attention's scores for each pair of a prompt's tokens.")
    shared_bytes: Bytes | None = Field(None, description="Shared once by equal jobs that are trained together.")
    steps: tuple[MeasuredStep, ...]
