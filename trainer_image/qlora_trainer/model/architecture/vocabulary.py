"""Embeddings and an output layer whose rows, one for each token of the vocabulary, are spread over the ranks of a run.

They are never gathered. Each rank has its rows for the tokens of all ranks, and returns to each rank what it found for
that rank's tokens (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Every rank must run the same number of passes.
"""

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.func import functional_call
from torch.nn.functional import embedding, linear

from qlora_trainer.model.protocols import Decoder


@dataclass(frozen=True)
class VocabularyPart:
    """The rows of one rank."""

    rank: int
    ranks: int
    first: int
    """The number of the first row."""
    rows: int

    @classmethod
    def from_rank(cls, rank: int, ranks: int, vocabulary: int) -> Self:
        """The rows of a rank. The ranks differ by one row at most."""
        first, end = (vocabulary * number // ranks for number in (rank, rank + 1))
        return cls(rank, ranks, first, end - first)

    def of(self, whole: Tensor) -> Tensor:
        """The part of a tensor with a row for each token of the vocabulary."""
        return whole[self.first : self.first + self.rows]

    def local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each token, and whether another rank has it; its row is 0 then."""
        rows = tokens - self.first
        elsewhere = (rows < 0) | (rows >= self.rows)
        return rows.masked_fill_(elsewhere, 0), elsewhere

    def gather(self, own: Tensor, size: int) -> Tensor:
        """[ranks x size, ...]: what each rank has passed, up to `size` rows, with zeros up to there."""
        padded = own.new_zeros(size, *own.shape[1:])
        padded[: len(own)] = own
        of_all = own.new_empty(self.ranks * size, *own.shape[1:])
        torch.distributed.all_gather_single(of_all, padded)
        return of_all

    def return_sums(self, parts: Tensor) -> Tensor:
        """[size, ...]: this rank's rows of `parts`, ordered as by `gather`, summed over the ranks in their order."""
        received = torch.empty_like(parts)
        torch.distributed.all_to_all_single(received, parts)
        return received.view(self.ranks, -1, *parts.shape[1:]).sum(dim=0)


def largest(size: int) -> int:
    """The largest size that a rank has passed. Exchanged in main memory, so that nothing waits for a GPU."""
    sizes = torch.tensor(size)
    torch.distributed.all_reduce(sizes, ReduceOp.MAX)
    return int(sizes)


class SpreadEmbedding(nn.Module):
    """This rank's part of frozen embeddings."""

    def __init__(self, whole: nn.Embedding, part: VocabularyPart, weight: nn.Parameter) -> None:
        super().__init__()
        self.part, self.embedding = part, whole
        whole.weight = weight
        # It only excludes a row from the gradient, and is no row of what `forward` looks up in.
        whole.padding_idx = None

    def forward(self, tokens: Tensor) -> Tensor:
        """The embeddings of this rank's tokens, as the family computes them."""
        rows, elsewhere = self.part.local(self.part.gather(tokens.flatten(), largest(tokens.numel())))
        # One rank has each: the sum is exact.
        found = embedding(rows, self.embedding.weight).masked_fill_(elsewhere.unsqueeze(1), 0.0)
        own = self.part.return_sums(found)[: tokens.numel()]
        numbers = torch.arange(len(own), device=tokens.device).view_as(tokens)
        return cast("Tensor", functional_call(self.embedding, {"weight": own}, (numbers,)))


class SpreadHead(nn.Module):
    """This rank's part of a frozen output layer."""

    def __init__(self, whole: nn.Linear, part: VocabularyPart, weight: nn.Parameter) -> None:
        super().__init__()
        self.part, self.weight = part, weight
        bias = None if whole.bias is None else part.of(whole.bias.data).clone()
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """The logits of this rank's tokens of the vocabulary, [states, rows]."""
        return linear(states, self.weight, self.bias)


def spreadable(model: Decoder) -> tuple[nn.Embedding | nn.Linear, ...]:
    """The embeddings and the output layer. One that is trained stays whole, as its frozen original does."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(module for module in modules if isinstance(module, nn.Embedding | nn.Linear))


def spread_vocabulary(model: Decoder, rank: int, ranks: int, device: torch.device) -> tuple[int, int]:
    """Leave this rank's rows of the spreadable modules, on the device. Returns their bytes, and those of all ranks.

    Of weights that are mapped from a file only these rows are read.
    """
    # Both modules have one weight in a model that ties them.
    own: dict[Tensor, nn.Parameter] = {}
    for module in spreadable(model):
        weight = module.weight
        part = VocabularyPart.from_rank(rank, ranks, len(weight))
        if weight not in own:
            own[weight] = nn.Parameter(part.of(weight.data).to(device, copy=True), requires_grad=False)
        kind = SpreadEmbedding if isinstance(module, nn.Embedding) else SpreadHead
        _replace(model, module, kind(module, part, own[weight]))
    return sum(part.nbytes for part in own.values()), sum(weight.nbytes for weight in own)


def _replace(model: Decoder, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is old and module is not new:
                setattr(module, name, new)
