"""The router as a first PyTorch implementation writes it: boolean masks over experts, in a loop.

K rounds of ``argmax`` with one-hot masks choose; then a loop over experts compares all choices with
each expert to count it, to add its term of the balancing loss, and to list its tokens and weights.
Nothing is made slow on purpose: masks are never nested in a loop over tokens, and every operation
runs over whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class NaiveRouting:
    """What a loop over experts needs.

    Args:
        tokens: For each expert the tokens that chose it.
        weights: For each expert the weights of those, differentiable.
        counts_E: How many they are.
        loss: Balancing loss and z-loss, with their coefficients.
    """

    tokens: list[Tensor]
    weights: list[Tensor]
    counts_E: Tensor
    loss: Tensor


def naive_route(
    logits_TE: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    aux_coeff: float = 0.0,
    z_coeff: float = 0.0,
    bias_E: Tensor | None = None,
    num_groups: int | None = None,
    group_topk: int | None = None,
) -> NaiveRouting:
    """Choose, weigh, count, and compute the losses.

    Args:
        logits_TE: Router logits, ``(T, E)``.
        topk: K.
        score_function: ``softmax`` or ``sigmoid``.
        aux_coeff: Of the Switch loss over these tokens.
        z_coeff: Of the mean squared ``logsumexp``.
        bias_E: Added to the scores for the choice alone.
        num_groups: G, for group-limited choice.
        group_topk: Groups a token may use.
    """
    softmax = score_function == "softmax"
    scores_TE = logits_TE.softmax(-1) if softmax else logits_TE.sigmoid()
    ranked_TE = logits_TE.detach() if softmax else scores_TE.detach()
    if bias_E is not None:
        ranked_TE = ranked_TE + bias_E
    if num_groups is not None and group_topk is not None:
        ranked_TE = _best_groups_alone(ranked_TE, num_groups, group_topk, topk // group_topk)
    indices, masks = _largest(ranked_TE, topk)
    indices_TK = torch.stack(indices, dim=1)
    weights_TK = torch.stack([(scores_TE * mask_TE).sum(-1) for mask_TE in masks], dim=1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)

    num_tokens, num_experts = logits_TE.shape
    tokens, weights, counts = [], [], []
    loss = z_coeff * logits_TE.logsumexp(-1).square().mean()
    for expert in range(num_experts):
        mask_TK = indices_TK == expert
        count = mask_TK.sum()
        if aux_coeff:
            share = count / (num_tokens * topk)
            loss = loss + aux_coeff * num_experts * share * scores_TE[:, expert].mean()
        token, place = torch.where(mask_TK)
        tokens.append(token)
        weights.append(weights_TK[token, place])
        counts.append(count)
    return NaiveRouting(tokens, weights, torch.stack(counts), loss)


def _largest(values_TE: Tensor, rounds: int) -> tuple[list[Tensor], list[Tensor]]:
    """Places and one-hot masks of the largest value of each row, of the next, and so on."""
    places, masks = [], []
    for _ in range(rounds):
        places.append(values_TE.argmax(-1))
        masks.append(F.one_hot(places[-1], values_TE.shape[-1]).bool())
        values_TE = values_TE.masked_fill(masks[-1], float("-inf"))
    return places, masks


def _best_groups_alone(ranked_TE: Tensor, num_groups: int, group_topk: int, best: int) -> Tensor:
    """Rule out the experts of all groups but those with the largest sum of their best few."""
    sums = []
    for group_Te in ranked_TE.chunk(num_groups, dim=1):
        masks = torch.stack(_largest(group_Te, best)[1])
        sums.append((group_Te * masks).sum(-1).sum(0))
    allowed_TG = torch.stack(_largest(torch.stack(sums, dim=1), group_topk)[1]).any(0)
    allowed_TE = allowed_TG.repeat_interleave(ranked_TE.shape[1] // num_groups, dim=1)
    return ranked_TE.masked_fill(~allowed_TE, float("-inf"))
