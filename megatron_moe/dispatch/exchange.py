"""Copies to the ranks that own their experts, weights travelling in the same message.

Sending a weight beside its row, as raw bits in extra columns, saves the collective of its own that
it would take each way: a step of the layer has four all-to-alls (dispatch, combine, and their
backwards) instead of six.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.dispatch.plan import DispatchPlan
from megatron_moe.parallel import collectives
from megatron_moe.parallel.groups import ExpertGroups


def exchange(
    x_ND: Tensor, probs_N: Tensor, plan: DispatchPlan, groups: ExpertGroups
) -> tuple[Tensor, Tensor]:
    """Send each copy, with its weight, to the ranks that own its expert.

    Args:
        x_ND: Copies in expert order, ``(N, D)``.
        probs_N: Their weights, ``(N,)``; the dtype may differ from that of ``x_ND``.
        plan: This step's plan.
        groups: The layer's groups.

    Returns:
        x_RD: Copies received, by local expert, ``(R, D)``; R may be 0.
        probs_R: Their weights.

    Cost: forward one all-to-all of N · (D + 1) elements, and with ETP one all-gather; backward the
    same all-to-all, and with ETP two reduce-scatters. No host sync.
    Source: GShard, arXiv:2006.16668.
    """
    if groups.tp_ep.size() == 1:
        assert plan.local_order_R is None, "one rank sends in the order of its own experts"
        return x_ND, probs_N
    return _Exchange.apply(x_ND, probs_N, plan, groups)


class _Exchange(torch.autograd.Function):
    """Pack, send, gather, unpack; putting rows in order is part of packing and unpacking."""

    @staticmethod
    def forward(ctx, x_ND, probs_N, plan, groups):
        ctx.args = (plan, groups)
        width, dtype = x_ND.shape[1], probs_N.dtype
        rows = collectives.all_to_all(
            _pack(x_ND, probs_N, None), plan.input_splits, plan.output_splits, groups.ep
        )
        rows = collectives.all_gather(rows, plan.etp_sizes, groups.etp)
        return _unpack(rows, width, dtype, plan.local_order_R)

    @staticmethod
    def backward(ctx, grad_x_RD, grad_probs_R):
        plan, groups = ctx.args
        width, dtype = grad_x_RD.shape[1], grad_probs_R.dtype
        order_R = plan.local_order_R
        if groups.etp.size() > 1:
            # Sums need numbers, not bits: two reduce-scatters before the bits travel.
            if order_R is not None:
                grad_x_RD, grad_probs_R = (
                    _scattered(g, order_R) for g in (grad_x_RD, grad_probs_R)
                )
            grad_x_RD = collectives.reduce_scatter(grad_x_RD, plan.etp_sizes, groups.etp)
            grad_probs_R = collectives.reduce_scatter(grad_probs_R, plan.etp_sizes, groups.etp)
            order_R = None
        rows = collectives.all_to_all(
            _pack(grad_x_RD, grad_probs_R, order_R),
            plan.output_splits,
            plan.input_splits,
            groups.ep,
        )
        return *_unpack(rows, width, dtype, None), None, None


def restore(x_RD: Tensor, order_R: Tensor) -> Tensor:
    """Undo the order of the local experts; the backward is a gather, not an addition into zeros."""
    return _Restore.apply(x_RD, order_R)


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, order_R):
        ctx.save_for_backward(order_R)
        return _scattered(x_RD, order_R)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None


def _scattered(x_RX: Tensor, order_R: Tensor) -> Tensor:
    return torch.empty_like(x_RX).index_copy_(0, order_R, x_RX)


def _pack(x_ND: Tensor, probs_N: Tensor, order_N: Tensor | None) -> Tensor:
    """Rows of x with the bits of the weight in extra columns of x's dtype.

    Args:
        x_ND: Rows.
        probs_N: Their weights.
        order_N: Where each row goes; None leaves it where it is.
    """
    if probs_N.element_size() < x_ND.element_size():
        probs_N = probs_N.to(x_ND.dtype)  # exact: to a wider dtype
    if order_N is None:
        return torch.cat([x_ND, _bits(probs_N, x_ND.dtype)], dim=1)
    width = x_ND.shape[1]
    bits = _bits(_scattered(probs_N, order_N), x_ND.dtype)
    rows = x_ND.new_empty(x_ND.shape[0], width + bits.shape[1])
    rows[:, :width].index_copy_(0, order_N, x_ND)
    rows[:, width:] = bits
    return rows


def _bits(probs_N: Tensor, dtype: torch.dtype) -> Tensor:
    return probs_N.contiguous().unsqueeze(1).view(dtype)


def _unpack(
    rows: Tensor, width: int, dtype: torch.dtype, order_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The adjoint of :func:`_pack`: row r comes from ``order_N[r]``."""
    x_ND, bits = rows[:, :width], rows[:, width:].contiguous()
    if bits.element_size() * bits.shape[1] == dtype.itemsize:
        probs_N = bits.view(dtype).squeeze(1)
    else:
        probs_N = bits.squeeze(1).to(dtype)
    if order_N is None:
        return x_ND.contiguous(), probs_N
    return x_ND.index_select(0, order_N), probs_N.index_select(0, order_N)
