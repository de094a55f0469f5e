"""How many tokens an expert takes, and which choices are given up when more come."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def capacity_of(num_tokens: int, topk: int, num_experts: int, factor: float) -> int:
    """Rows that one expert takes from one rank: ``⌈factor · T · K / E⌉``."""
    return math.ceil(num_tokens * topk / num_experts * factor)


def within_capacity(
    probs_TK: Tensor,
    indices_TK: Tensor,
    num_experts: int,
    capacity: int,
    policy: str,
    valid_TK: Tensor | None = None,
) -> Tensor:
    """Which choices an expert has room for.

    Args:
        probs_TK: Weights, ``(T, K)``.
        indices_TK: Experts, ``(T, K)``.
        num_experts: E.
        capacity: Rows an expert takes.
        policy: ``probs`` keeps the heaviest choices of an expert (the earlier token on a tie),
            ``position`` the first tokens of the sequence-major order (first come, first served).
        valid_TK: False where a choice takes no room at all (padding tokens).

    Returns:
        ``(T, K)`` bool.

    Raises:
        ValueError: Unknown ``policy``.
    """
    if policy not in ("probs", "position"):
        raise ValueError(f"moe_token_drop_policy ({policy}) must be probs or position")
    expert_N = indices_TK.flatten()
    if valid_TK is not None:  # behind all experts: takes no room of any of them
        expert_N = torch.where(valid_TK.flatten(), expert_N, num_experts)
    queue_N = torch.arange(expert_N.numel(), device=expert_N.device)
    if policy == "probs":
        queue_N = probs_TK.detach().flatten().argsort(descending=True, stable=True)
    queue_N = queue_N[expert_N[queue_N].argsort(stable=True)]
    kept_N = torch.empty_like(expert_N, dtype=torch.bool)
    kept_N[queue_N] = place_in_expert(expert_N[queue_N], num_experts) < capacity
    kept_N &= expert_N < num_experts
    return kept_N.view_as(indices_TK)


def place_in_expert(sorted_expert_N: Tensor, num_experts: int) -> Tensor:
    """Place of each choice in its expert's queue, ``(N,)``, for choices sorted by expert.

    Experts are 0 … E; E itself stands for "no expert".
    """
    counts = torch.bincount(sorted_expert_N, minlength=num_experts + 1)
    start = counts.cumsum(0) - counts
    return torch.arange(sorted_expert_N.numel(), device=counts.device) - start[sorted_expert_N]
