"""Logits → scores → the routing decision.

Shapes: T tokens of this rank, E experts, K choices a token, G groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.route.topk import best_experts

# Keeps a normalisation of all-zero sigmoid scores finite; Megatron's value, for equal results.
_EPSILON = 1e-20


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing decision of one layer for one micro-batch, made once.

    Args:
        indices_TK: Expert of each choice, ``(T, K)`` int64; the K of a token are distinct.
        probs_TK: Weight of each choice, ``(T, K)``, differentiable.
        num_experts: E.
        kept_TK: False where a choice is not carried out (over capacity, or the token is
            padding), ``(T, K)`` bool; None when every choice is.
        capacity: With padding to capacity, the rows that every expert takes from this rank.
    """

    indices_TK: Tensor
    probs_TK: Tensor
    num_experts: int
    kept_TK: Tensor | None = None
    capacity: int | None = None

    def tokens_per_expert(self) -> Tensor:
        """How many choices are carried out at each expert, ``(E,)`` int64."""
        return count_choices(self.indices_TK, self.num_experts, self.kept_TK)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Megatron's form: ``probs`` ``(T, E)`` and ``routing_map`` ``(T, E)`` bool."""
        kept_TK = torch.ones_like(self.indices_TK, dtype=torch.bool)
        kept_TK = kept_TK if self.kept_TK is None else self.kept_TK
        shape = (self.indices_TK.shape[0], self.num_experts)
        routing_map_TE = torch.zeros(shape, dtype=torch.bool, device=kept_TK.device)
        routing_map_TE = routing_map_TE.scatter(1, self.indices_TK, kept_TK)
        probs_TE = self.probs_TK.new_zeros(shape)
        return probs_TE.scatter(1, self.indices_TK, self.probs_TK * kept_TK), routing_map_TE


def count_choices(indices_TK: Tensor, num_experts: int, valid_TK: Tensor | None = None) -> Tensor:
    """Count choices per expert, ``(E,)`` int64; those where ``valid_TK`` is False are left out."""
    chosen = indices_TK.flatten() if valid_TK is None else indices_TK[valid_TK]
    return torch.bincount(chosen, minlength=num_experts)


def score(logits_TE: Tensor, score_function: str) -> Tensor:
    """Score each expert independently of the choice, ``(T, E)``, in fp32 or better.

    Raises:
        ValueError: Unknown ``score_function``.
    """
    logits_TE = _at_least_fp32(logits_TE)
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE)
    if score_function == "sqrtsoftplus":
        return F.softplus(logits_TE).sqrt()
    raise ValueError(
        f"moe_router_score_function ({score_function}) must be softmax, sigmoid or sqrtsoftplus"
    )


def balance_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores over all experts that sum to 1 for each token: what the balancing losses push on."""
    scores_TE = score(logits_TE, score_function)
    if score_function == "softmax":
        return scores_TE
    return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + _EPSILON)


def choose(
    logits_TE: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    expert_bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token and weigh them.

    Args:
        logits_TE: Router logits, ``(T, E)``.
        topk: K.
        score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        pre_softmax: Softmax over all experts before the choice, not over the chosen after it.
        num_groups: G, for group-limited choice.
        group_topk: Groups a token may use; None for no limit.
        scaling_factor: Multiplies the weights.
        expert_bias_E: Added to sigmoid-like scores for the choice only, never to the weights.

    Returns:
        probs_TK: Weights in the dtype of ``logits_TE``.
        indices_TK: The chosen experts, best first.

    Raises:
        ValueError: Unknown ``score_function``.

    Source: Switch arXiv:2101.03961, DeepSeek-V2 arXiv:2405.04434 (groups), loss-free balancing
    arXiv:2408.15664 (bias).
    """
    late_softmax = score_function == "softmax" and not pre_softmax
    scores_TE = _at_least_fp32(logits_TE) if late_softmax else score(logits_TE, score_function)
    ranked_TE = scores_TE.detach()
    if expert_bias_E is not None:
        ranked_TE = ranked_TE + expert_bias_E
    if group_topk:
        assert num_groups is not None
        ranked_TE = _keep_best_groups(ranked_TE, topk, num_groups, group_topk)
    indices_TK = best_experts(ranked_TE, topk)
    probs_TK = scores_TE.gather(1, indices_TK)
    if late_softmax:
        probs_TK = torch.softmax(probs_TK, dim=-1)
    elif score_function != "softmax" and topk > 1:
        probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + _EPSILON)
    if scaling_factor:
        probs_TK = probs_TK * scaling_factor
    return probs_TK.type_as(logits_TE), indices_TK


def _keep_best_groups(ranked_TE: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Rule out the experts of all but the best ``group_topk`` groups of each token.

    A group is as good as the sum of its best ``topk / group_topk`` experts.
    """
    grouped = ranked_TE.unflatten(1, (num_groups, -1))
    group_scores_TG = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
    best = group_scores_TG.topk(group_topk, dim=-1, sorted=False).indices
    ruled_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(ruled_out_TG.unsqueeze(-1), float("-inf")).flatten(1)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
