"""Balance by thresholds: an offset per expert, found as a quantile, without loss or step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.scope import gather_scope
from megatron_moe.route.scores import at_least_fp32
from megatron_moe.route.tokens import Tokens
from megatron_moe.route.topk import best_experts


class Quantile(Choice):
    """The K best of ``logit - β``, where β gave every expert its share of the batch before.

    For each micro-batch, α is a token's first value that was not chosen, and β of an expert the
    threshold on ``logit - α`` that just its share n · K / E of tokens pass; shares that are no
    whole number are rounded up. β is averaged over the global batch, blended with
    ``moe_router_quantile_balancing_ema`` and centred. The key in a checkpoint is Megatron's.

    Source: Megatron-Core's quantile balancing; the offset per expert arXiv:2408.15664.
    """

    balanced = True
    ranks_with_bias = False
    ignores = ("moe_router_group_topk", "moe_router_enable_expert_bias")

    def __init__(self, config: Any, moe: Any, groups: ExpertGroups) -> None:
        super().__init__(config, moe, groups)
        self._sum_E = torch.zeros(self.num_experts, dtype=torch.float64)
        self._count = 0

    def buffers(self) -> dict[str, Tensor]:
        """β of each expert."""
        return {"qb_beta": torch.zeros(self.num_experts)}

    def pick(self, tokens: Tokens) -> Picked:
        """Choose by the thresholds of the batch before, and find those of this micro-batch."""
        logits_TE = at_least_fp32(tokens.logits_TE.detach())
        beta_E = self.state["qb_beta"]
        if tokens.training and self.topk < self.num_experts:
            everyone = gather_scope(logits_TE, tokens.valid_T, self.groups.tp_cp)
            valid_A = everyone.valid_A
            rows = everyone.rows if valid_A is None else everyone.rows[valid_A]
            if rows.shape[0]:
                self._sum_E = self._sum_E.to(rows.device) + thresholds(rows, self.topk, beta_E)
                self._count += 1
        return Picked(best_experts(logits_TE - beta_E, self.topk))

    def summary(self) -> Tensor:
        """Sum of the micro-batches' thresholds, and how many there were."""
        summary = torch.cat([self._sum_E, self._sum_E.new_tensor([self._count])])
        self._sum_E, self._count = torch.zeros_like(self._sum_E), 0
        return summary

    def end_batch(self, summed: Tensor | None) -> None:
        """Blend the mean threshold into β."""
        assert summed is not None
        if summed[-1] == 0:
            return
        ema = self.config.moe_router_quantile_balancing_ema
        beta_E = self.state["qb_beta"]
        mean_E = (summed[:-1] / summed[-1]).to(beta_E)
        beta_E.copy_(ema * beta_E + (1.0 - ema) * mean_E)
        beta_E -= beta_E.mean()


def thresholds(logits_AE: Tensor, topk: int, beta_E: Tensor) -> Tensor:
    """One step of the dual: the threshold of each expert, ``(E,)`` fp64; needs K < E and A > 0."""
    num_tokens, num_experts = logits_AE.shape
    alpha_A1 = (logits_AE - beta_E).topk(topk + 1, dim=1).values[:, -1:]
    share = min(-(-num_tokens * topk // num_experts), num_tokens - 1)
    passed_AE = (logits_AE - alpha_A1).topk(share + 1, dim=0).values
    return passed_AE[-1].double()
