"""How many tokens an expert takes, and which choices are given up when more come.

A dropped choice is not carried out: the token keeps its other experts, and without any it passes
by the residual connection alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.decision import Picked
from megatron_moe.route.scope import gather_scope

POLICIES = ("probs", "position", "random", "prioritised")


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limit on an expert's tokens.

    Args:
        factor: Of an even share, in training; None for no limit.
        eval_factor: In evaluation; None for no limit.
        minimum: Rows an expert takes in any case.
        scope: Whose tokens share the limit: of a ``rank``, a ``micro_batch`` (the tensor ×
            context parallel ranks), or ``global`` (the data-parallel ranks too).
        policy: Who comes first: see :func:`within_capacity`; ``random`` is anybody.
        padded: Whether every expert takes exactly its capacity, in empty rows if need be.
    """

    factor: float | None = None
    eval_factor: float | None = None
    minimum: int = 0
    scope: str = "rank"
    policy: str = "probs"
    padded: bool = False

    @classmethod
    def from_options(cls, config: Any, moe: Any) -> Capacity:
        """Read Megatron's options and ours; ``auto`` scope becomes the one that fits."""
        factor = config.moe_expert_capacity_factor
        padded = bool(config.moe_pad_expert_input_to_capacity)
        order = moe.drop_order
        return cls(
            factor=factor,
            eval_factor=moe.eval_capacity_factor or factor,
            minimum=moe.min_capacity,
            # Every rank sends each expert the same rows if padded, so each must have its own limit.
            scope=("rank" if padded else "micro_batch")
            if moe.capacity_scope == "auto"
            else moe.capacity_scope,
            policy=config.moe_token_drop_policy if order == "policy" else order,
            padded=padded,
        )

    def limit(
        self,
        probs_TK: Tensor,
        picked: Picked,
        num_experts: int,
        topk: float,
        groups: ExpertGroups,
        training: bool,
    ) -> tuple[Tensor | None, int | None]:
        """Which choices are carried out, and the rows of a padded expert.

        Args:
            probs_TK: Weights, ``(T, K)``.
            picked: The choices, padding tokens without any.
            num_experts: E.
            topk: Choices a token is expected to make: an even share is T · topk / E.
            groups: The layer's.
            training: Which factor counts.

        Cost: with a scope wider than the rank, an all-gather of the choices and their weights.
        """
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return picked.chosen_TK, None
        weights_TK, policy = probs_TK.detach(), self.policy
        if policy == "random":  # drawn here and gathered, so that the ranks of a scope agree
            weights_TK, policy = torch.rand_like(weights_TK), "probs"
        indices, chosen, mine = picked.indices_TK, picked.chosen_TK, slice(None)
        group = {"rank": None, "micro_batch": groups.tp_cp, "global": groups.tp_dp_cp}[self.scope]
        if group is not None and group.size() > 1:
            # One gather of all three; integers up to 2^53 are exact in fp64.
            row_TX = torch.cat([indices, weights_TK, picked.mask()], dim=1).double()
            everyone = gather_scope(row_TX, None, group)
            indices, weights_TK, chosen = everyone.rows.chunk(3, dim=1)
            indices, chosen, mine = indices.long(), chosen.bool(), everyone.mine
        rows = capacity_of(indices.shape[0], topk, num_experts, factor, self.minimum)
        kept = within_capacity(weights_TK, indices, num_experts, rows, policy, chosen)
        return kept[mine], rows if self.padded else None


def capacity_of(
    num_tokens: int, topk: float, num_experts: int, factor: float, minimum: int = 0
) -> int:
    """Rows that one expert takes: ``⌈factor · T · K / E⌉``, at least ``minimum``."""
    return max(minimum, math.ceil(num_tokens * topk / num_experts * factor))


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
        policy: Who comes first. ``probs``: the heaviest choice (the earlier token on a tie).
            ``position``: the first token of the sequence-major order.
            ``prioritised``: first choices before second ones, and among them the token whose
            first choice is heaviest, arXiv:2106.05974.
        valid_TK: False where a choice takes no room at all (padding tokens).

    Returns:
        ``(T, K)`` bool.

    Raises:
        ValueError: Unknown ``policy``.
    """
    expert_N = indices_TK.flatten()
    if valid_TK is not None:  # behind all experts: takes no room of any of them
        expert_N = torch.where(valid_TK.flatten(), expert_N, num_experts)
    queue_N = _queue(probs_TK.detach(), policy)
    queue_N = queue_N[expert_N[queue_N].argsort(stable=True)]
    kept_N = torch.empty_like(expert_N, dtype=torch.bool)
    kept_N[queue_N] = place_in_expert(expert_N[queue_N], num_experts) < capacity
    kept_N &= expert_N < num_experts
    return kept_N.view_as(indices_TK)


def _queue(probs_TK: Tensor, policy: str) -> Tensor:
    """All choices in the order in which they are served, ``(T · K,)`` places."""
    num_tokens, topk = probs_TK.shape
    device = probs_TK.device
    if policy == "position":
        return torch.arange(num_tokens * topk, device=device)
    if policy == "probs":
        return probs_TK.flatten().argsort(descending=True, stable=True)
    if policy == "prioritised":
        token_T = probs_TK.amax(dim=1).argsort(descending=True, stable=True)
        places_K1 = torch.arange(topk, device=device).unsqueeze(1)
        return (token_T * topk + places_K1).flatten()
    raise ValueError(
        f"the drop policy ({policy}) must be one of {', '.join(POLICIES)}; see "
        "--moe-token-drop-policy and --moe-drop-order"
    )


def place_in_expert(sorted_expert_N: Tensor, num_experts: int) -> Tensor:
    """Place of each choice in its expert's queue, ``(N,)``, for choices sorted by expert.

    Experts are 0 … E; E itself stands for "no expert".
    """
    counts = torch.bincount(sorted_expert_N, minlength=num_experts + 1)
    start = counts.cumsum(0) - counts
    return torch.arange(sorted_expert_N.numel(), device=counts.device) - start[sorted_expert_N]
