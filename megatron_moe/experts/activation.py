"""Between the two linear layers of an expert: activation, gate and weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# On a CPU, wide copies of half-precision rows are made a block at a time, to stay in the cache.
_ELEMENTS_PER_BLOCK = 2**17


def weighted_activation(
    hidden_RF: Tensor,
    probs_R: Tensor | None,
    activation_func: Callable[[Tensor], Tensor],
    *,
    gated: bool,
    linear_offset: float = 0.0,
    clamp: float | None = None,
) -> Tensor:
    """Activate, gate, and weigh each row.

    Args:
        hidden_RF: Output of the first linear layer, ``(R, F)``, or ``(R, 2F)`` = gate ‖ linear.
        probs_R: Weight of each row; None for 1.
        activation_func: Of the gate half when gated, else of all.
        gated: Whether the rows hold two halves (SwiGLU and its kin).
        linear_offset: Added to the linear half.
        clamp: Upper bound of the gate half and bound of the linear half's magnitude.

    Returns:
        ``(R, F)`` in the dtype of ``hidden_RF``; the weight is applied in its own dtype, which
        is fp32 by default.
    """
    if gated:
        gate_RF, linear_RF = hidden_RF.chunk(2, dim=-1)
        if clamp is not None:
            gate_RF = gate_RF.clamp(max=clamp)
            linear_RF = linear_RF.clamp(min=-clamp, max=clamp)
        if linear_offset:
            linear_RF = linear_RF + linear_offset
        out_RF = activation_func(gate_RF) * linear_RF
    else:
        out_RF = activation_func(hidden_RF)
    if probs_R is None:
        return out_RF
    if out_RF.dtype == probs_R.dtype or out_RF.is_cuda:
        return (out_RF * probs_R.unsqueeze(-1)).to(hidden_RF.dtype)
    return _Weigh.apply(out_RF, probs_R).to(hidden_RF.dtype)


class _Weigh(torch.autograd.Function):
    """``x · p`` a row, computed in the wider dtype and given in that of ``x``."""

    @staticmethod
    def forward(ctx, x_RF, probs_R):
        ctx.save_for_backward(x_RF, probs_R)
        out_RF = torch.empty_like(x_RF)
        for out, x, p in _blocks(out_RF, x_RF, probs_R.unsqueeze(-1)):
            out.copy_(_wide(x, p).mul_(p))
        return out_RF

    @staticmethod
    def backward(ctx, grad_RF):
        x_RF, probs_R = ctx.saved_tensors
        grad_x_RF, grad_probs_R = torch.empty_like(x_RF), torch.empty_like(probs_R)
        p_R1, grad_p_R1 = probs_R.unsqueeze(-1), grad_probs_R.unsqueeze(-1)
        for grad_x, grad_p, grad, x, p in _blocks(grad_x_RF, grad_p_R1, grad_RF, x_RF, p_R1):
            wide = grad.to(torch.promote_types(x.dtype, p.dtype))
            grad_p.copy_(_wide(x, p).mul_(wide).sum(-1, keepdim=True))
            grad_x.copy_(wide * p)
        return grad_x_RF, grad_probs_R


def _wide(x: Tensor, p: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, p.dtype), copy=True)


def _blocks(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = max(1, _ELEMENTS_PER_BLOCK // max(1, max(one.shape[1] for one in rows)))
    return zip(*(one.split(size) for one in rows), strict=True)
