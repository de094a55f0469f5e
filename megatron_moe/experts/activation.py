"""Between the two linear layers of an expert: activation, gate and weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


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
    return (out_RF * probs_R.unsqueeze(-1)).to(hidden_RF.dtype)
