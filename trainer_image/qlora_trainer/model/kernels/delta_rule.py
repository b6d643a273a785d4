"""The gated delta rule of linear attention within rows, as one differentiable operation of few matmuls.

transformers' reference updates the state in a loop over chunks of 64 tokens, with about 60 operations a chunk, forward
and backward, and carries it into the next row. Here the effect of each chunk on the state is a matrix, one operation
computes all of them, and the loop has one matmul a chunk. A row's state ends with it.
"""

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import solve_triangular
from torch.nn.functional import pad, rms_norm

from qlora_trainer.model.protocols import AutogradContext

_CHUNK = 128
"""Tokens of a chunk: the usual size of a head, so a matrix between tokens is as large as a state."""
_EPSILON = 1e-6
"""Added to the square of the norm of queries and keys, as in transformers."""


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, row_numbers: Tensor
) -> Tensor:
    """Gated delta networks by chunks (Yang et al. 2024, arXiv 2412.06464), as transformers computes them.

    `query` and `key` are [1, tokens, key heads, size] and get norm 1; `value` is [1, tokens, heads, value size], with
    groups of heads that share a key; `log_decay`, at most 0, and `beta` are [1, tokens, heads]. `row_numbers`, int
    [tokens], are the tokens' rows. Computed in 32 bit at least, without autocast. Returns
    [1, tokens, heads, value size] in the type of `query`.
    """
    tokens, size = query.shape[1], query.shape[3]
    chunk = min(_CHUNK, tokens)
    missing = -tokens % chunk
    dtype = torch.promote_types(query.dtype, torch.float32)

    def in_chunks(tensor: Tensor) -> Tensor:
        """[..., tokens, heads, any] as [..., chunks, heads, tokens of a chunk, any]."""
        full = pad(tensor, (0, 0, 0, 0, 0, missing)) if missing else tensor
        return full.unflatten(-3, (-1, chunk)).transpose(-3, -2)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(dtype, memory_format=torch.contiguous_format)

    with torch.autocast(query.device.type, enabled=False):
        pairs = widened(in_chunks(torch.cat((query, key))).permute(1, 2, 0, 3, 4))
        # x / |x| is x / rms(x) / sqrt(size).
        pairs = rms_norm(pairs, (size,), pairs.new_full((size,), size**-0.5), _EPSILON / size)
        values = widened(in_chunks(value.squeeze(0)))
        decays, betas = (widened(in_chunks(each.unsqueeze(-1)).flatten(3).squeeze(0)) for each in (log_decay, beta))
        # A chunk's tokens, behind the last one of the chunk before it.
        rows = pad(row_numbers, (1, missing), value=-1).unfold(0, chunk + 1, chunk)
        is_visible = (rows[:, 1:, None] == rows[:, None, :]).tril_(1)
        output = cast("Tensor", _DeltaRule.apply(pairs, values, decays, betas, is_visible))
    by_token = output.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format)
    by_token = by_token.flatten(0, 1).unsqueeze(0)
    return by_token[:, :tokens] if missing else by_token


class _DeltaRule(torch.autograd.Function):
    """Attention of queries q, keys k and values v with factors b, by chunks.

    With the state S before a chunk, and without decays: u = (1 + b · tril(k k', -1))^-1 b · (v - k S), the output is
    q S + tril(q k') u, and the state behind the chunk is S + k' u.
    """

    @staticmethod
    def forward(
        context: AutogradContext, pairs: Tensor, values: Tensor, decays: Tensor, betas: Tensor, is_visible: Tensor
    ) -> Tensor:
        heads, scale = values.shape[1], pairs.shape[4] ** -0.5
        values, betas = _flat(values, 2), _flat(betas, 2)
        weights = _weights(decays, is_visible)
        by_query, by_key = _parts(_products(pairs, weights))
        system = by_key * betas.unsqueeze(2)
        solved = solve_triangular(system, torch.diag_embed(betas), upper=False, unitriangular=True)
        queries, keys = _parts(_reading(pairs, weights))
        updates, read = solved @ values, solved @ keys
        written = _writing(pairs, weights)
        matrices = _transitions(written, read[:-heads], weights)
        states = updates.new_empty(len(updates), keys.shape[2], updates.shape[2])
        states[:heads].zero_()
        torch.bmm(written.mT, updates[:-heads], out=states[heads:])
        by_chunk = states.split(heads)
        for matrix, state, following in zip(matrices.split(heads), by_chunk, by_chunk[1:], strict=False):
            following.baddbmm_(matrix, state, alpha=-1)
        updates.baddbmm_(read, states, alpha=-1)
        context.save_for_backward(pairs, values, weights, betas, is_visible, solved, updates, states)
        output = (queries @ states).baddbmm_(by_query, updates, beta=scale, alpha=scale)
        return output.unflatten(0, (-1, heads))

    @staticmethod
    @once_differentiable
    def backward(context: AutogradContext, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs, values, weights, betas, is_visible, solved, updates, states = context.saved_tensors
        products = _products(pairs, weights)
        by_query, by_key = _parts(products)
        of_products = torch.empty_like(products)
        of_by_query, of_by_key = _parts(of_products)
        of_output = _flat(gradient, 2) * pairs.shape[4] ** -0.5
        torch.bmm(of_output, updates.mT, out=of_by_query)
        of_pairs, of_values, of_sums, of_solved = _backward_of_states(
            pairs, values, weights, solved, updates, states, by_query, of_output
        )
        of_sides = solve_triangular((by_key * betas.unsqueeze(2)).mT, of_solved, upper=True, unitriangular=True)
        # Of the system, with the other sign.
        of_system = of_sides @ solved.mT
        of_system.diagonal(dim1=1, dim2=2).zero_()
        of_betas = of_sides.diagonal(dim1=1, dim2=2) - (of_system * by_key).sum(2)
        torch.mul(of_system, betas.neg().unsqueeze(2), out=of_by_key)
        del of_output, of_solved, of_sides, of_system
        of_logarithms = of_products * products
        of_sums += (of_logarithms.sum((3, 5)) - of_logarithms.sum((3, 4))).flatten(1, 2)
        del of_logarithms, products, by_query, by_key
        of_decays = of_sums @ is_visible[..., 1:].to(of_sums.dtype)
        of_products.mul_(_by_group(weights[..., 1:], pairs).unsqueeze(3))
        of_scores = _flat(of_products.sum(2).flatten(2, 3), 2)
        flat_pairs, of_flat_pairs = (_flat(each.flatten(2, 3), 2) for each in (pairs, of_pairs))
        of_flat_pairs.baddbmm_(of_scores, _flat(pairs[:, :, 1], 2))
        of_flat_pairs[:, weights.shape[2] :].baddbmm_(of_scores.mT, flat_pairs)
        return of_pairs, of_values, of_decays, of_betas.view_as(of_sums), None


def _backward_of_states(
    pairs: Tensor,
    values: Tensor,
    weights: Tensor,
    solved: Tensor,
    updates: Tensor,
    states: Tensor,
    by_query: Tensor,
    of_output: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients, as far as through states: of pairs, values, sums of logarithms, and of what the solver returned."""
    chunks, heads = weights.shape[:2]
    reading = _reading(pairs, weights)
    queries, keys = _parts(reading)
    written = _writing(pairs, weights)
    of_updates = by_query.mT @ of_output
    of_following = _of_following(queries, solved @ keys, written, weights, of_output, of_updates)
    of_updates[:-heads].baddbmm_(written, of_following)
    of_read = (of_updates @ states.mT).neg_()
    of_values = (solved.mT @ of_updates).unflatten(0, (chunks, heads))
    of_solved = (of_updates @ values.mT).baddbmm_(of_read, keys.mT)
    del of_updates

    # Each weight is a factor of a product, so the gradient of its logarithm is a sum of products.
    of_reading = torch.empty_like(reading)
    of_queries, of_keys = _parts(of_reading)
    torch.bmm(of_output, states.mT, out=of_queries)
    torch.bmm(solved.mT, of_read, out=of_keys)
    of_sums = (of_reading * reading).sum((3, 5)).flatten(1, 2)
    of_pairs = of_reading.mul_(_by_group(weights[..., :1], pairs).unsqueeze(3)).sum(2)
    del reading, queries, keys, of_reading, of_queries, of_keys, of_read

    of_written = updates[:-heads] @ of_following.mT
    of_their_sums = (of_written * written).sum(2).unflatten(0, (-1, heads))
    of_sums[:-1].sub_(of_their_sums)
    of_decay = (of_following * states[:-heads]).sum((1, 2)).view(-1, heads)
    of_sums[:-1, :, -1].addcmul_(of_decay, weights[:-1, :, -1, 0]).add_(of_their_sums.sum(2))
    by_group = _by_group(of_written.unflatten(0, (-1, heads)), pairs)
    of_pairs[:-1, :, 1].add_(by_group.mul_(_by_group(weights[:-1, :, -1, 1:, None], pairs)).sum(2))
    return of_pairs, of_values, of_sums, of_solved


def _of_following(
    queries: Tensor, read: Tensor, written: Tensor, weights: Tensor, of_output: Tensor, of_updates: Tensor
) -> Tensor:
    """Gradients of the states behind all chunks but the last, [(chunks - 1) · heads, size, value size]."""
    chunks, heads = weights.shape[:2]
    of_states = (queries.mT @ of_output).baddbmm_(read.mT, of_updates, alpha=-1)
    by_chunk = of_states.split(heads)
    matrices = _transitions(written, read[:-heads], weights).split(heads)
    for number in range(chunks - 2, 0, -1):
        by_chunk[number].baddbmm_(matrices[number].mT, by_chunk[number + 1], alpha=-1)
    return of_states[heads:]


def _weights(decays: Tensor, is_visible: Tensor) -> Tensor:
    """The share of the state before the chunk, and of each token, left at a token of the same row, otherwise 0.

    `decays` are [chunks, heads, chunk]. Returns [chunks, heads, chunk, 1 + chunk].
    """
    # Sums that begin with each row: those of another row round nothing here. In 64 bit, as strong decays add up to
    # thousands, and their differences count.
    sums = decays.double() @ is_visible[..., 1:].double().mT
    logarithms = decays.new_empty(*decays.shape, decays.shape[2] + 1)
    torch.sub(sums.unsqueeze(3), pad(sums, (1, 0)).unsqueeze(2), out=logarithms)
    return logarithms.masked_fill_(is_visible.logical_not().unsqueeze(1), float("-inf")).exp_()


def _products(pairs: Tensor, weights: Tensor) -> Tensor:
    """Of queries and keys with keys, decayed: [chunks, key heads, groups, 2, chunk, chunk]."""
    products = _flat(pairs.flatten(2, 3), 2) @ _flat(pairs[:, :, 1], 2).mT
    by_pair = products.unflatten(0, (-1, pairs.shape[1], 1)).unflatten(3, (2, -1))
    return by_pair * _by_group(weights[..., 1:], pairs).unsqueeze(3)


def _reading(pairs: Tensor, weights: Tensor) -> Tensor:
    """Queries and keys that read the state before: [chunks, key heads, groups, 2, chunk, size]."""
    return pairs.unsqueeze(2) * _by_group(weights[..., :1], pairs).unsqueeze(3)


def _writing(pairs: Tensor, weights: Tensor) -> Tensor:
    """Keys that write the states behind all chunks but the last: [(chunks - 1) · heads, chunk, size]."""
    return _flat(pairs[:-1, :, 1].unsqueeze(2) * _by_group(weights[:-1, :, -1, 1:, None], pairs), 3)


def _transitions(written: Tensor, read: Tensor, weights: Tensor) -> Tensor:
    """[(chunks - 1) · heads, size, size]: S minus their product with a state S is what the chunk leaves of it."""
    matrices = written.mT @ read
    matrices.diagonal(dim1=1, dim2=2).sub_(weights[:-1, :, -1, 0].flatten()[:, None])
    return matrices


def _by_group(weights: Tensor, pairs: Tensor) -> Tensor:
    """[chunks, heads, any] as [chunks, key heads, groups, any]."""
    return weights.unflatten(1, (pairs.shape[1], -1))


def _parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to queries and to keys, each [chunks · heads, chunk, any]."""
    first, second = tensor.unbind(3)
    return _flat(first, 3), _flat(second, 3)


def _flat(tensor: Tensor, dimensions: int) -> Tensor:
    """The same with so many first dimensions as one, as batched matmuls take it."""
    return tensor.flatten(0, dimensions - 1)
