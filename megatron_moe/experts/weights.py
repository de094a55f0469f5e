"""The weights of local experts, whichever way they are stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def first_weights(experts: Any) -> list[Tensor]:
    """The first layer's weight of each local expert, ``(F, D)``: this rank's slice of F.

    Args:
        experts: Sequential experts, stacked ones, or Transformer Engine's grouped ones.
    """
    if hasattr(experts, "local_experts"):
        return [expert.linear_fc1.weight for expert in experts.local_experts]
    linear = experts.linear_fc1
    if hasattr(linear, "weight"):
        return list(linear.weight.unbind(0))
    return [getattr(linear, f"weight{i}") for i in range(experts.num_local_experts)]
