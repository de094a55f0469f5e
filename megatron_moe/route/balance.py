"""The balancing losses: one written formula each, as this rank's summand.

For a scope (a micro-batch, one sequence, a global batch) with n valid tokens, of which the
choices of expert e number c_e::

    f_e = c_e / (K · n)         share of the choices that went to e     (no gradient)
    P_e = Σ_t s_te / n          mean balance score of e                 (carries the gradient)
    L   = E · Σ_e f_e · P_e     1 when balanced, E when one expert takes all

The scope is spread over ranks: every function here returns the summand of this rank's tokens, so
that the sum over the ranks that share the scope is L. Counts and n are those of the whole scope.
"""

from __future__ import annotations

import torch
from torch import Tensor


def switch_loss(scores_TE: Tensor, counts_E: Tensor, num_valid: Tensor | int, topk: int) -> Tensor:
    """This rank's summand of L, a scalar.

    Args:
        scores_TE: Balance scores of this rank's tokens, zero for padding, ``(T, E)``; or of
            several scopes at once, ``(T, B, E)``.
        counts_E: c_e of the whole scope, ``(E,)`` or ``(B, E)``.
        num_valid: n of the whole scope, a scalar or ``(B,)``; an empty scope (0) gives 0.
        topk: K.

    Returns:
        A scalar, or ``(B,)``.

    Source: Switch arXiv:2101.03961; over the global batch arXiv:2501.11873.
    """
    n = torch.as_tensor(num_valid, device=scores_TE.device).clamp(min=1).to(scores_TE.dtype)
    num_experts = scores_TE.shape[-1]
    score_sums = scores_TE.sum(dim=0)
    return (score_sums * counts_E).sum(-1) * num_experts / (topk * n * n)


def z_loss(logits_TE: Tensor, num_valid: Tensor | int, valid_T: Tensor | None = None) -> Tensor:
    """This rank's summand of the mean of ``logsumexp(logits)²`` over a scope's n valid tokens.

    Source: ST-MoE arXiv:2202.08906.
    """
    squares_T = logits_TE.logsumexp(dim=-1).square()
    if valid_T is not None:
        squares_T = squares_T * valid_T
    n = torch.as_tensor(num_valid, device=logits_TE.device).clamp(min=1)
    return squares_T.sum() / n
