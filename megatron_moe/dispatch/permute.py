"""Token order ↔ expert order, each the adjoint of the other.

With every choice carried out, a token is the sum of exactly K copies, and that sum is one
gather-reduce (``embedding_bag``), which is deterministic, adds in fp32 and writes no zeros first.
Otherwise copies are added where they belong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.dispatch.plan import CopyOrder


def permute(x_TD: Tensor, order: CopyOrder) -> Tensor:
    """Copy each token once per choice, in expert order; empty rows are zero.

    Args:
        x_TD: Tokens, ``(T, D)``.
        order: The order of the copies.

    Returns:
        ``(N, D)``.

    Cost: N · D elements written; keeps no activation for backward.
    """
    return _Permute.apply(x_TD, order)


def unpermute(y_ND: Tensor, order: CopyOrder) -> Tensor:
    """Sum the copies of each token, ``(N, D)`` → ``(T, D)``; a token without copies is zero."""
    return _Unpermute.apply(y_ND, order)


def permute_probs(probs_TK: Tensor, order: CopyOrder) -> Tensor:
    """The weight of each copy, ``(T, K)`` → ``(N,)``; empty rows weigh zero."""
    probs = probs_TK.flatten()
    if order.padded:
        probs = F.pad(probs, (0, 1))
    return probs.index_select(0, order.choice_N)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, order):
        ctx.order = order
        return _copies(x_TD, order)

    @staticmethod
    def backward(ctx, grad_ND):
        return _sums(grad_ND, ctx.order), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_ND, order):
        ctx.order = order
        return _sums(y_ND, order)

    @staticmethod
    def backward(ctx, grad_TD):
        return _copies(grad_TD, ctx.order), None


def _copies(x_TD: Tensor, order: CopyOrder) -> Tensor:
    if order.padded:
        x_TD = F.pad(x_TD, (0, 0, 0, 1))
    return x_TD.index_select(0, order.token_N)


def _sums(y_ND: Tensor, order: CopyOrder) -> Tensor:
    if order.copy_TK is not None and y_ND.shape[0] > 0:
        # Detached: it would otherwise also write what its own backward needs.
        return F.embedding_bag(order.copy_TK, y_ND.detach().contiguous(), mode="sum")
    rows = order.num_tokens + int(order.padded)
    # fp32: K roundings of a half-precision running sum would differ from the gather-reduce.
    dtype = torch.promote_types(y_ND.dtype, torch.float32)
    sums = y_ND.new_zeros((rows, y_ND.shape[1]), dtype=dtype)
    sums.index_add_(0, order.token_N, y_ND.to(dtype))
    return sums[: order.num_tokens].to(y_ND.dtype)
