"""As many experts as a token needs: between k_min and k_max, the mean held to a target.

Both rules order a token's experts by score and give each place j a value v_tj that grows with j::

    top_p        v = log(A / R)      A score mass before the place, R the mass from it on
    threshold    v = -log(score)

Places with v below one number, the *cut*, are chosen; the first k_min always, those from k_max on
never. Logarithms tell places apart as well where a router is nearly uniform as where it is so sharp
that all mass but 1e-12 is on one expert.

Two things hold the mean number of experts to the target. The budget loss bends the scores::

    L = (k̄ / k* - 1)²      k̄ mean number of experts over the micro-batch's valid tokens

with the gradient of a soft count, Σ_j sigmoid((cut - v_tj) / softness). And after each global
batch the cut becomes the quantile of v that would have met the target in that batch, so that the
target is met whatever the loss coefficient is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import OwnLoss
from megatron_moe.route.scores import balance_scores, log_score, ranked_by
from megatron_moe.route.tokens import Tokens
from megatron_moe.route.topk import best_experts

_BINS = 2**15  # each 0.2 % of a score
_SOFTNESS = 0.5  # nats
_NOTHING = -1e30  # the logarithm of no mass at all, finite so that its gradient is


class Adaptive(Choice):
    """A cut through values of the sorted experts; subclasses say which values.

    Cost: sums of 32,768 bins a layer in the all-reduce after each global batch.
    """

    ignores = ("moe_router_group_topk",)
    low, high = 0.0, 60.0  # values outside are as good as the nearest inside

    def __init__(self, config: Any, moe: Any, groups: Any) -> None:
        super().__init__(config, moe, groups)
        self.k_min, self.k_max, self.target_k = bounds(config, moe)
        self._cut_known = False
        self._sums = _no_counts(torch.device("cpu"))

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """The bounds must leave room for the target."""
        k_min, k_max, target = bounds(config, moe)
        faults = []
        if not 1 <= k_min <= k_max <= config.num_moe_experts:
            faults.append(
                f"k_min ({k_min}) and k_max ({k_max}) must satisfy 1 ≤ k_min ≤ k_max ≤ "
                f"num_moe_experts ({config.num_moe_experts})"
            )
        elif target >= 0 and not k_min <= target <= k_max:
            faults.append(
                f"target_k ({target:g}) must lie between k_min ({k_min}) and k_max ({k_max})"
            )
        if (target < 0 or moe.router_cut) and not 0 < moe.router_cut < 1:
            why = (
                " when a negative target_k leaves it fixed"
                if target < 0
                else "; 0 finds it in the first batch"
            )
            faults.append(f"router_cut ({moe.router_cut}) must lie between 0 and 1{why}")
        return faults

    @property
    def places(self) -> int:
        """As many as the most experts of a token."""
        return self.k_max

    @property
    def mean_k(self) -> float:
        """The target; without one, the top-k."""
        return self.target_k if self.target_k >= 0 else self.topk

    def values(self, log_scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """The v of each place, ``(T, K)``, growing along K; experts come best first."""
        raise NotImplementedError

    def cut_of(self, option: float) -> float:
        """The cut that ``router_cut`` asks for."""
        raise NotImplementedError

    def buffers(self) -> dict[str, Tensor]:
        """The cut; NaN until the first batch has shown where it must be."""
        asked = self.moe.router_cut
        return {"choice_cut": torch.tensor([self.cut_of(asked) if asked else float("nan")])}

    def pick(self, tokens: Tokens) -> Picked:
        """Sort, cut."""
        c = self.config
        ranked_TE = ranked_by(
            tokens.logits_TE, c.moe_router_score_function, c.moe_router_pre_softmax, tokens.bias_TE
        )
        indices_TK = best_experts(ranked_TE, self.k_max)
        values_TK = self._values(tokens.logits_TE, indices_TK)
        counts = self._histogram(values_TK, tokens.valid_T)
        if tokens.training:
            self._sums = self._sums.to(counts.device) + counts
        chosen_TK = values_TK < self._cut(counts)
        chosen_TK[:, : self.k_min] = True
        return Picked(indices_TK, chosen_TK)

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """Each chosen expert's score over all experts.

        Not renormalised over the chosen: with one expert the weight would be 1 whatever the
        router says, and the more certain the router, the less it would learn.
        """
        scores_TE = balance_scores(logits_TE, self.config.moe_router_score_function)
        factor = self.config.moe_router_topk_scaling_factor or 1.0
        return (scores_TE.gather(1, picked.indices_TK) * factor).type_as(logits_TE)

    def losses(self, tokens: Tokens, picked: Picked) -> list[OwnLoss]:
        """The budget loss, with the hard count as its value and the soft one's gradient."""
        coeff, valid_T = self.moe.budget_loss_coeff, tokens.valid_T
        if self.target_k < 0 or not coeff:
            return []
        values_TK = self._values(tokens.logits_TE, picked.indices_TK)
        soft_TK = torch.sigmoid((self.state["choice_cut"] - values_TK) / _SOFTNESS)
        soft_T = soft_TK[:, self.k_min :].sum(1)
        num_T = picked.mask().sum(1)
        if valid_T is not None:
            soft_T, num_T = soft_T * valid_T, num_T * valid_T
        ones_T = torch.ones_like(num_T) if valid_T is None else valid_T
        sums = torch.stack([num_T.sum(), ones_T.sum()]).double()
        group = self.groups.tp_cp
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        if sums[1] == 0:
            return []
        excess = sums[0] / sums[1] / self.target_k - 1.0
        slope = 2.0 * excess / (self.target_k * sums[1])
        moved = soft_T.sum() - soft_T.sum().detach()
        loss = slope.to(moved.dtype) * moved + excess.square().to(moved.dtype) / group.size()
        return [OwnLoss("router_budget_loss", coeff, loss)]

    def summary(self) -> Tensor:
        """Histogram of the values that a cut decides about, and the number of tokens."""
        sums = self._sums
        self._sums = _no_counts(sums.device)
        return sums

    def end_batch(self, summed: Tensor | None) -> None:
        """Put the cut where the batch would have met the target."""
        assert summed is not None
        if self.target_k >= 0 and summed[-1] > 0:
            self.state["choice_cut"].fill_(self._cut_for(summed))

    def _values(self, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        log_scores_TE = log_score(logits_TE, self.config.moe_router_score_function)
        values_TK = self.values(log_scores_TE.log_softmax(1), indices_TK)
        return values_TK.clamp(self.low, self.high)

    def _histogram(self, values_TK: Tensor, valid_T: Tensor | None) -> Tensor:
        """Counts of the values by bin, and of tokens, ``(bins + 1,)`` fp64."""
        values_TK = values_TK if valid_T is None else values_TK[valid_T]
        share_TK = (values_TK[:, self.k_min :] - self.low) / (self.high - self.low)
        bins = (share_TK * _BINS).long().clamp(0, _BINS - 1)
        counts = torch.bincount(bins.flatten(), minlength=_BINS + 1).double()
        counts[-1] = values_TK.shape[0]
        return counts

    def _cut(self, counts: Tensor) -> Tensor:
        """The cut in force; before the first one is known, that of this very micro-batch."""
        cut = self.state["choice_cut"]
        if not self._cut_known:
            counts = counts.clone()
            if bool(cut.isnan()) and self.groups.tp_dp_cp.size() > 1:
                dist.all_reduce(counts, group=self.groups.tp_dp_cp)
            if bool(cut.isnan()) and counts[-1] > 0:
                cut.fill_(self._cut_for(counts))
            self._cut_known = not bool(cut.isnan())
        return cut

    def _cut_for(self, counts: Tensor) -> float:
        """The cut that would have met the target in what was counted."""
        share = share_below(counts, self.target_k - self.k_min)
        return self.low + share * (self.high - self.low)


class TopP(Adaptive):
    """The fewest experts whose scores sum to p.

    Source: Huang et al. arXiv:2403.07652.
    """

    low = -30.0
    high = 30.0

    def values(self, log_scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """Odds, in nats, of the score mass before each place against the mass from it on."""
        best_TK = log_scores_TE.gather(1, indices_TK)
        others_T1 = log_scores_TE.scatter(1, indices_TK, _NOTHING).logsumexp(1, keepdim=True)
        onwards_TK = torch.cat([best_TK, others_T1], 1).flip(1).logcumsumexp(1).flip(1)[:, :-1]
        first_T1 = torch.full_like(others_T1, _NOTHING)
        before_TK = torch.cat([first_T1, best_TK.logcumsumexp(1)[:, :-1]], 1)
        return before_TK - onwards_TK

    def cut_of(self, option: float) -> float:
        """``router_cut`` is p."""
        return math.log(option / (1.0 - option))


class Threshold(Adaptive):
    """All experts with a score above a threshold.

    Source: threshold routing of AdaMoE, Zeng et al. arXiv:2406.13233, without null experts.
    """

    def values(self, log_scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """How far below 0 the logarithm of each score is."""
        return -log_scores_TE.gather(1, indices_TK)

    def cut_of(self, option: float) -> float:
        """``router_cut`` is the score that an expert must exceed."""
        return -math.log(option)


def _no_counts(device: torch.device) -> Tensor:
    return torch.zeros(_BINS + 1, dtype=torch.float64, device=device)


def bounds(config: Any, moe: Any) -> tuple[int, int, float]:
    """k_min, k_max and the target, with the defaults filled in."""
    k_max = moe.k_max or min(2 * config.moe_router_topk, config.num_moe_experts)
    return moe.k_min, k_max, moe.target_k or float(config.moe_router_topk)


def share_below(counts: Tensor, places_a_token: float) -> float:
    """How far up the range of a histogram ``places_a_token`` · tokens of its values lie.

    Args:
        counts: Histogram, and the number of tokens as its last element.
        places_a_token: Wanted choices a token, without the k_min that are always made.

    Returns:
        From 0 to 1; above 1 where that many values do not exist.
    """
    wanted = places_a_token * float(counts[-1])
    sums = counts[:-1].cumsum(0)
    if wanted >= float(sums[-1]):
        return 1.1
    place = int(torch.searchsorted(sums, wanted, right=True))
    below = float(sums[place]) - float(counts[place])
    return (place + (wanted - below) / max(float(counts[place]), 1.0)) / _BINS
