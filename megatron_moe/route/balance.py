"""The balancing losses: one written formula each.

For a scope (a micro-batch, one sequence, a global batch) with n valid tokens, of whose choices c_e
fell on expert e::

    f_e = c_e / Σ c             share of the choices that went to e     (no gradient)
    P_e = Σ_t s_te / n          mean balance score of e                 (carries the gradient)

    switch   L = E · Σ_e f_e · P_e              1 when balanced, E when one expert takes all
    kl       L = Σ_e P_e · log(E · P_e)         0 when P is uniform, log E at most
             = log E - entropy(P)

A loss is a function of P and f over the whole scope. The scope is spread over ranks and, being a
mean over tokens, so is its gradient: dL/ds_te = (∂L/∂P_e) / n for each token wherever it lies.
:func:`summand` turns that into what one rank adds, so that the sum over the ranks that share the
scope has the value L and the gradient of L.

One of your own is a function of ``(P, f)``, both ``(..., E)``, differentiable in P::

    megatron-moe run … --moe-balance-losses my_package.my_losses:hinge@global=0.01
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.choice import load_named
from megatron_moe.route.scope import SCOPES

BalanceFunction = Callable[[Tensor, Tensor], Tensor]

_LOSSES: dict[str, str] = {
    "switch": "megatron_moe.route.balance:switch",
    "kl": "megatron_moe.route.balance:kl",
}
# Megatron's kinds of loss, as ours: name, scope, and what Megatron logs them as.
MEGATRON_LOSSES = {
    "aux_loss": ("switch", "micro_batch", "load_balancing_loss"),
    "seq_aux_loss": ("switch", "sequence", "seq_load_balancing_loss"),
    "global_aux_loss": ("switch", "global", "global_load_balancing_loss"),
}


def switch(mean_scores_E: Tensor, shares_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e.

    Source: Switch arXiv:2101.03961; over the global batch arXiv:2501.11873.
    """
    return mean_scores_E.shape[-1] * (mean_scores_E * shares_E).sum(-1)


def kl(mean_scores_E: Tensor, shares_E: Tensor) -> Tensor:
    """KL divergence of the mean router distribution from the uniform one, in nats.

    Unlike the Switch loss it has a gradient where no choice is made differently: it sees the
    scores alone. The shares' own divergence is a metric (``telemetry.metrics.load_kl``).
    """
    safe_E = mean_scores_E.clamp(min=torch.finfo(mean_scores_E.dtype).tiny)
    return (mean_scores_E * (safe_E * safe_E.shape[-1]).log()).sum(-1)


@dataclass(frozen=True, slots=True)
class BalanceLoss:
    """One balancing loss of a router.

    Args:
        function: L of (P, f).
        scope: ``micro_batch``, ``sequence`` or ``global``.
        coeff: What L is multiplied with, the same in every layout.
        log_name: What it is logged as.
    """

    function: BalanceFunction
    scope: str
    coeff: float
    log_name: str


def balance_losses(config: Any, moe: Any) -> list[BalanceLoss]:
    """The losses that Megatron's options and ours ask for, those with coefficient 0 left out.

    Raises:
        ValueError: A loss that is not written ``NAME@SCOPE=COEFFICIENT``, or not known.
    """
    kinds, coeffs = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coeffs = [kinds], [coeffs]
    found = []
    for kind, coeff in zip(kinds, coeffs, strict=True):
        if coeff and kind in MEGATRON_LOSSES:
            name, scope, log_name = MEGATRON_LOSSES[kind]
            found.append(BalanceLoss(_function(name), scope, coeff, log_name))
    return found + [loss for text in moe.balance_losses if (loss := _parsed(text)).coeff]


def _parsed(text: str) -> BalanceLoss:
    match = re.fullmatch(r"(?P<name>[\w.:]+)@(?P<scope>\w+)=(?P<coeff>[-+.\deE]+)", text)
    if not match or match["scope"] not in SCOPES:
        raise ValueError(
            f"balance_losses ({text}) must be written NAME@SCOPE=COEFFICIENT, such as "
            f"kl@global=0.01, with a scope of {', '.join(SCOPES)}"
        )
    try:
        coeff = float(match["coeff"])
    except ValueError:
        raise ValueError(f"balance_losses ({text}): {match['coeff']} is not a number") from None
    short = match["name"].rpartition(":")[2]
    log_name = f"{short}_{match['scope']}_balance_loss"
    return BalanceLoss(_function(match["name"]), match["scope"], coeff, log_name)


def _function(name: str) -> BalanceFunction:
    return load_named(name, _LOSSES, "balance_losses")


def summand(
    function: BalanceFunction,
    score_sums_E: Tensor,
    mean_scores_E: Tensor,
    shares_E: Tensor,
    num_valid: Tensor,
    num_ranks: int,
) -> Tensor:
    """This rank's part of L: over the ranks, values sum to L and gradients to that of L.

    Args:
        function: L of (P, f).
        score_sums_E: Σ_t s_te over this rank's tokens, ``(..., E)``, with gradient.
        mean_scores_E: P of the whole scope, ``(..., E)``.
        shares_E: f of the whole scope.
        num_valid: n, ``(...)``; a scope without tokens gives 0.
        num_ranks: Ranks that share the scope.

    Returns:
        ``(...)``, one for each scope.
    """
    mean_scores_E = mean_scores_E.detach().requires_grad_()
    with torch.enable_grad():
        losses = function(mean_scores_E, shares_E)
        (slopes_E,) = torch.autograd.grad(losses.sum(), mean_scores_E)
    some = num_valid > 0
    n = torch.where(some, num_valid, torch.ones_like(num_valid)).unsqueeze(-1)
    moved_E = (score_sums_E - score_sums_E.detach()) / n
    value = losses.detach() / num_ranks + (slopes_E * moved_E).sum(-1)
    return torch.where(some, value, torch.zeros_like(value))


def z_loss(
    logits_TE: Tensor,
    num_valid: Tensor | int,
    valid_T: Tensor | None = None,
    logsumexp_T: Tensor | None = None,
) -> Tensor:
    """This rank's summand of the mean of ``logsumexp(logits)²`` over a scope's n valid tokens.

    Args:
        logits_TE: Logits of this rank's tokens.
        num_valid: n.
        valid_T: False for padding; None when there is none.
        logsumexp_T: Of the logits, where it is known already.

    Source: ST-MoE arXiv:2202.08906.
    """
    if logsumexp_T is None:
        logsumexp_T = logits_TE.logsumexp(dim=-1)
    squares_T = logsumexp_T.square()
    if valid_T is not None:
        squares_T = squares_T * valid_T
    n = torch.as_tensor(num_valid, device=logits_TE.device).clamp(min=1)
    return squares_T.sum() / n
