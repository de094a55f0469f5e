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
    if groups.tp_ep.size() > 1:
        x_RD, probs_R = _Exchange.apply(x_ND, probs_N, plan, groups)
    else:
        x_RD, probs_R = x_ND, probs_N
    if plan.local_order_R is not None:
        x_RD = reorder(x_RD, plan.local_order_R)
        probs_R = probs_R.index_select(0, plan.local_order_R)
    return x_RD, probs_R


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, probs_N, plan, groups):
        ctx.args = (plan, groups)
        width, dtype = x_ND.shape[1], probs_N.dtype
        rows = collectives.all_to_all(
            _pack(x_ND, probs_N), plan.input_splits, plan.output_splits, groups.ep
        )
        rows = collectives.all_gather(rows, plan.etp_sizes, groups.etp)
        return _unpack(rows, width, dtype)

    @staticmethod
    def backward(ctx, grad_x_RD, grad_probs_R):
        plan, groups = ctx.args
        width, dtype = grad_x_RD.shape[1], grad_probs_R.dtype
        # Sums need numbers, not bits: two reduce-scatters before the bits travel.
        grad_x = collectives.reduce_scatter(grad_x_RD, plan.etp_sizes, groups.etp)
        grad_probs = collectives.reduce_scatter(grad_probs_R, plan.etp_sizes, groups.etp)
        rows = collectives.all_to_all(
            _pack(grad_x, grad_probs), plan.output_splits, plan.input_splits, groups.ep
        )
        return *_unpack(rows, width, dtype), None, None


def reorder(x_RD: Tensor, order_R: Tensor) -> Tensor:
    """Rows in another order; the backward is a gather too, not an addition into zeros."""
    return _Reorder.apply(x_RD, order_R)


def restore(x_RD: Tensor, order_R: Tensor) -> Tensor:
    """Undo :func:`reorder`."""
    return _Restore.apply(x_RD, order_R)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, order_R):
        ctx.save_for_backward(order_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx, grad):
        return _scattered(grad, *ctx.saved_tensors), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, order_R):
        ctx.save_for_backward(order_R)
        return _scattered(x_RD, order_R)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None


def _scattered(x_RD: Tensor, order_R: Tensor) -> Tensor:
    return torch.empty_like(x_RD).index_copy_(0, order_R, x_RD)


def _pack(x_ND: Tensor, probs_N: Tensor) -> Tensor:
    """Rows of x with the bits of the weight in extra columns of x's dtype."""
    if probs_N.element_size() < x_ND.element_size():
        probs_N = probs_N.to(x_ND.dtype)  # exact: to a wider dtype
    bits = probs_N.contiguous().unsqueeze(1).view(x_ND.dtype)
    return torch.cat([x_ND, bits], dim=1)


def _unpack(rows: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bits = rows[:, width:].contiguous()
    if bits.element_size() * bits.shape[1] == dtype.itemsize:
        probs_N = bits.view(dtype).squeeze(1)
    else:
        probs_N = bits.squeeze(1).to(dtype)
    return rows[:, :width].contiguous(), probs_N
