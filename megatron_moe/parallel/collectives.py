"""Row exchanges with autograd: uneven splits, zero rows, and the adjoint as the backward.

Each exchange is a linear map between ranks. Its backward is the transposed map:
all-to-all ↔ all-to-all with splits swapped, all-gather ↔ reduce-scatter.

gloo has neither an uneven all-gather nor an uneven reduce-scatter; both are then carried by one
``all_to_all_single``, which moves the same bytes, and the sum is taken in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_N, input_splits, output_splits, group):
        ctx.args = (output_splits, input_splits, group)
        return _all_to_all(x_N, input_splits, output_splits, group)

    @staticmethod
    def backward(ctx, grad_R):
        return _all_to_all(grad_R, *ctx.args), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_N, sizes, group):
        ctx.args = (sizes, group)
        return _all_gather(x_N, sizes, group)

    @staticmethod
    def backward(ctx, grad_R):
        return _reduce_scatter(grad_R, *ctx.args), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_R, sizes, group):
        ctx.args = (sizes, group)
        return _reduce_scatter(x_R, sizes, group)

    @staticmethod
    def backward(ctx, grad_N):
        return _all_gather(grad_N, *ctx.args), None, None


def all_to_all(
    x_N: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: ProcessGroup
) -> Tensor:
    """Send ``input_splits[r]`` rows to rank r, receive ``output_splits[r]`` rows from it.

    Args:
        x_N: Rows in order of destination rank, ``(N, ...)``; N may be 0.
        input_splits: Rows for each rank of the group; sums to N.
        output_splits: Rows from each rank of the group; sums to R.
        group: P ranks.

    Returns:
        Rows in order of source rank, ``(R, ...)``; R may be 0.

    Raises:
        ValueError: ``x_N`` has not ``sum(input_splits)`` rows.

    Cost: one all-to-all; none when the group has one rank.
    """
    if x_N.shape[0] != sum(input_splits):
        raise ValueError(f"all_to_all: {x_N.shape[0]} rows, but input_splits {input_splits}")
    if group.size() == 1:
        return x_N
    return _AllToAll.apply(x_N, list(input_splits), list(output_splits), group)


def all_gather(x_N: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Gather rows of every rank, in rank order; the gradient is reduce-scattered.

    Args:
        x_N: This rank's rows, ``(sizes[rank], ...)``.
        sizes: Rows of each rank; they may differ.
        group: P ranks.

    Returns:
        ``(sum(sizes), ...)``.
    """
    if group.size() == 1:
        return x_N
    return _AllGather.apply(x_N, list(sizes), group)


def reduce_scatter(x_R: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Sum over ranks and keep this rank's rows; the gradient is all-gathered.

    Args:
        x_R: One summand of every rank's rows, ``(sum(sizes), ...)``.
        sizes: Rows that each rank keeps; they may differ.
        group: P ranks.

    Returns:
        ``(sizes[rank], ...)``.
    """
    if group.size() == 1:
        return x_R
    return _ReduceScatter.apply(x_R, list(sizes), group)


def gather_counts(counts_E: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's counts, ``(P, E)``, on the device of ``counts_E``; no gradient.

    Cost: one all-gather of P · E integers.
    """
    if group.size() == 1:
        return counts_E.unsqueeze(0)
    out = counts_E.new_empty(group.size() * counts_E.numel())
    dist.all_gather_into_tensor(out, counts_E.contiguous(), group=group)
    return out.view(group.size(), *counts_E.shape)


def _all_to_all(x, input_splits, output_splits, group):
    out = x.new_empty((sum(output_splits), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), output_splits, input_splits, group=group)
    return out


def _is_gloo(group: ProcessGroup) -> bool:
    return dist.get_backend(group) == "gloo"


def _all_gather(x, sizes, group):
    if _is_gloo(group):
        copies = x.unsqueeze(0).expand(group.size(), *x.shape).reshape(-1, *x.shape[1:])
        return _all_to_all(copies, [x.shape[0]] * group.size(), sizes, group)
    out = x.new_empty((sum(sizes), *x.shape[1:]))
    if len(set(sizes)) == 1:
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    else:
        dist.all_gather(list(out.split(sizes)), x.contiguous(), group=group)
    return out


def _reduce_scatter(x, sizes, group):
    mine = sizes[group.rank()]
    if _is_gloo(group):
        parts = _all_to_all(x, sizes, [mine] * group.size(), group)
        return parts.view(group.size(), mine, *x.shape[1:]).sum(0)
    out = x.new_empty((mine, *x.shape[1:]))
    if len(set(sizes)) == 1:
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
    else:
        dist.reduce_scatter(out, list(x.contiguous().split(sizes)), group=group)
    return out
