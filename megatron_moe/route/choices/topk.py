"""The K best experts of each token: plain, group-limited, biased; Switch's one; GShard's two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.scores import log_score, ranked_by, score
from megatron_moe.route.tokens import Tokens
from megatron_moe.route.topk import best_experts


class TopK(Choice):
    """The K experts with the highest score, within the best groups where groups are set.

    Source: Shazeer et al. arXiv:1701.06538; groups DeepSeek-V2 arXiv:2405.04434; bias
    arXiv:2408.15664.
    """

    def pick(self, tokens: Tokens) -> Picked:
        """Rank (score plus bias), rule out groups, take the best; an earlier expert wins a tie."""
        c = self.config
        return pick_topk(
            tokens.logits_TE,
            self.topk,
            score_function=c.moe_router_score_function,
            pre_softmax=c.moe_router_pre_softmax,
            num_groups=c.moe_router_num_groups,
            group_topk=c.moe_router_group_topk,
            bias_TE=tokens.bias_TE,
        )


class Switch(TopK):
    """One expert, weighted by its softmax score: the router learns by that weight.

    With ``--moe-expert-capacity-factor`` and the balancing loss, which counts choices before any
    are dropped, this is the Switch Transformer's layer.

    Source: Fedus et al. arXiv:2101.03961.
    """

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """Switch is one softmax choice; other options contradict it."""
        faults = []
        if config.moe_router_topk != 1:
            faults.append(
                f"router_choice switch needs moe_router_topk 1, not {config.moe_router_topk}"
            )
        if config.moe_router_score_function != "softmax":
            faults.append(
                "router_choice switch needs moe_router_score_function softmax, not "
                f"{config.moe_router_score_function}; use router_choice topk for others"
            )
        return faults

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """The softmax score over all experts, whether or not ``moe_router_pre_softmax`` is set."""
        scores_T1 = score(logits_TE, "softmax").gather(1, picked.indices_TK)
        factor = self.config.moe_router_topk_scaling_factor or 1.0
        return (scores_T1 * factor).type_as(logits_TE)


class GShard(TopK):
    """Two experts, weights renormalised to sum to 1; the second may be dispatched at random.

    With ``second_expert random`` the second is kept with probability min(1, 2 · its weight), in
    training; the weights stay those of both, as in the paper.

    Source: Lepikhin et al. arXiv:2006.16668, algorithm 1.
    """

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """GShard is two choices."""
        if config.moe_router_topk == 2:
            return []
        return [f"router_choice gshard needs moe_router_topk 2, not {config.moe_router_topk}"]

    def pick(self, tokens: Tokens) -> Picked:
        """The two best; of the second, a share at random."""
        picked = super().pick(tokens)
        if self.moe.second_expert == "always" or not tokens.training:
            return picked
        second_T = self._shares(tokens.logits_TE, picked)[:, 1]
        keep_T = 2.0 * second_T > torch.rand_like(second_T)
        return Picked(picked.indices_TK, torch.stack([torch.ones_like(keep_T), keep_T], dim=1))

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """The scores of both, divided by their sum, also where only the first is dispatched."""
        factor = self.config.moe_router_topk_scaling_factor or 1.0
        return (self._shares(logits_TE, picked) * factor).type_as(logits_TE)

    def _shares(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """Weights before any scaling: they sum to 1 for each token."""
        scores_TE = log_score(logits_TE, self.config.moe_router_score_function)
        return torch.softmax(scores_TE.gather(1, picked.indices_TK), dim=-1)


def pick_topk(
    logits_TE: Tensor,
    topk: int,
    *,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    bias_TE: Tensor | None = None,
) -> Picked:
    """Choose K experts for each token.

    Args:
        logits_TE: Router logits, ``(T, E)``.
        topk: K.
        score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        pre_softmax: Softmax over all experts before the choice, not over the chosen after it.
        num_groups: G, for group-limited choice.
        group_topk: Groups a token may use; None for no limit.
        bias_TE: Added for the choice only, ``(E,)`` or ``(T, E)``.

    Returns:
        The choices, best first.

    Raises:
        ValueError: Unknown ``score_function``.
    """
    ranked_TE = ranked_by(logits_TE, score_function, pre_softmax, bias_TE)
    if group_topk:
        assert num_groups is not None
        late_softmax = score_function == "softmax" and not pre_softmax
        if bias_TE is None and not late_softmax:  # a group's merit is a sum of scores, not logits
            ranked_TE = score(logits_TE.detach(), score_function)
        ranked_TE = _keep_best_groups(ranked_TE, topk, num_groups, group_topk)
    return Picked(best_experts(ranked_TE, topk))


def _keep_best_groups(ranked_TE: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Rule out the experts of all but the best ``group_topk`` groups of each token.

    A group is as good as the sum of its best ``topk / group_topk`` experts.
    """
    grouped = ranked_TE.unflatten(1, (num_groups, -1))
    group_scores_TG = grouped.topk(topk // group_topk, dim=-1).values.sum(-1)
    best = group_scores_TG.topk(group_topk, dim=-1, sorted=False).indices
    ruled_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(ruled_out_TG.unsqueeze(-1), float("-inf")).flatten(1)
