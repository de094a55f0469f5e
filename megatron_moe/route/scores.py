"""Logits → scores: what a choice ranks by, what its weights are, what the balancing losses push on.

Shapes: T tokens of this rank, E experts, K places for choices, G groups of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_moe.route.decision import Picked
from megatron_moe.route.softmax import softmax


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision becomes fp32; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def score(logits_TE: Tensor, score_function: str) -> Tensor:
    """Score each expert independently of the choice, ``(T, E)``, in fp32 or better.

    Raises:
        ValueError: Unknown ``score_function``.
    """
    logits_TE = at_least_fp32(logits_TE)
    if score_function == "softmax":
        return softmax(logits_TE)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE)
    if score_function == "sqrtsoftplus":
        # The slope of a root is infinite at 0, and softplus underflows to 0 from -104 on.
        return F.softplus(logits_TE.clamp(min=-80.0)).sqrt()
    raise ValueError(
        f"moe_router_score_function ({score_function}) must be softmax, sigmoid or sqrtsoftplus"
    )


def log_score(logits_TE: Tensor, score_function: str) -> Tensor:
    """Logarithm of the score up to a constant of the token, finite where the score underflows.

    Normalising by a softmax of this replaces ``score / (sum + 1e-20)``, which is no distribution
    any more once a token's scores all fall below the constant.
    """
    logits_TE = at_least_fp32(logits_TE)
    if score_function == "softmax":
        return logits_TE
    if score_function == "sigmoid":
        return F.logsigmoid(logits_TE)
    # log softplus(x) → x as x → -∞; the clamp keeps the branch not taken finite in backward.
    usual = F.softplus(logits_TE.clamp(min=-30.0)).log()
    return 0.5 * torch.where(logits_TE < -30.0, logits_TE, usual)


def balance_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores over all experts that sum to 1 for each token: what the balancing losses push on."""
    return softmax(log_score(logits_TE, score_function))


def ranked_by(
    logits_TE: Tensor, score_function: str, pre_softmax: bool, bias_TE: Tensor | None = None
) -> Tensor:
    """What the choice ranks experts by, ``(T, E)``, without gradient.

    Scores grow with logits, so without a bias the logits themselves are ranked, which no
    underflow can tie. A bias is added to the scores (to the logits, where softmax comes after the
    choice).
    """
    logits_TE = at_least_fp32(logits_TE.detach())
    if bias_TE is None:
        return logits_TE
    late_softmax = score_function == "softmax" and not pre_softmax
    return (logits_TE if late_softmax else score(logits_TE, score_function)) + bias_TE


def weigh_chosen(
    logits_TE: Tensor,
    picked: Picked,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
) -> Tensor:
    """Weight of each choice, ``(T, K)`` in the dtype of the logits, differentiable.

    Softmax before the choice gives each chosen expert its score; otherwise the scores of the
    chosen sum to 1 for each token. One sigmoid-like choice keeps its score: normalised it would
    be 1 whatever the router says, and the router would get no gradient.

    Args:
        logits_TE: Router logits.
        picked: The choices; places without one get a weight that means nothing.
        score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        pre_softmax: Softmax over all experts, not over the chosen ones.
        scaling_factor: Multiplies the weights.
    """
    alone = score_function != "softmax" and picked.indices_TK.shape[1] == 1
    if alone or (score_function == "softmax" and pre_softmax):
        probs_TK = score(logits_TE, score_function).gather(1, picked.indices_TK)
    else:
        # As the logits are gathered first, the logarithm is taken of K values instead of E.
        chosen_TK = log_score(logits_TE.gather(1, picked.indices_TK), score_function)
        if picked.chosen_TK is not None:
            lowest = torch.finfo(chosen_TK.dtype).min
            chosen_TK = chosen_TK.masked_fill(~picked.chosen_TK, lowest)
        probs_TK = softmax(chosen_TK)
    if scaling_factor:
        probs_TK = probs_TK * scaling_factor
    return probs_TK.type_as(logits_TE)
