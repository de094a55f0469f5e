"""A balanced assignment by Sinkhorn's iteration, in the log domain and with a fixed length."""

from __future__ import annotations

import math

from torch import Tensor

from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.scope import gather_scope
from megatron_moe.route.scores import at_least_fp32, score
from megatron_moe.route.tokens import Tokens
from megatron_moe.route.topk import best_experts


class Sinkhorn(Choice):
    """The K best after offsets that would give every expert the same soft load.

    In training the offsets are found for the micro-batch; in evaluation each token goes by its own
    logits. Exponentials are taken inside logsumexp only, so logits of any size stay finite, and
    the number of iterations is fixed, so no rank waits for a norm on the host.

    Source: S-BASE layers, Clark et al. arXiv:2202.01169; Cuturi arXiv:1306.0895.
    """

    # In training alone, and within the micro-batch: its offsets come from all tokens.
    sees_future = True
    balanced = True
    ranks_with_bias = False
    ignores = (
        "moe_router_group_topk",
        "moe_router_enable_expert_bias",
        "moe_router_topk_scaling_factor",
    )

    def pick(self, tokens: Tokens) -> Picked:
        """Offset the logits, take the best."""
        logits_TE = at_least_fp32(tokens.logits_TE.detach())
        if tokens.training:
            everyone = gather_scope(logits_TE, tokens.valid_T, self.groups.tp_cp)
            valid_A = everyone.valid_A
            rows = everyone.rows if valid_A is None else everyone.rows[valid_A]
            logits_TE = logits_TE + balancing_offsets(rows, self.moe.sinkhorn_iterations)
        return Picked(best_experts(logits_TE, self.topk))

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """Sigmoid of the logit with K = 1, else softmax over all experts, as Megatron's."""
        scores_TE = score(logits_TE, "sigmoid" if self.topk == 1 else "softmax")
        return scores_TE.gather(1, picked.indices_TK).type_as(logits_TE)


def balancing_offsets(logits_AE: Tensor, iterations: int) -> Tensor:
    """Offsets ``(E,)`` under which exp(logits), scaled to rows of 1, has columns of A / E.

    Only differences between offsets matter: the scale of a row changes no choice in it.
    """
    num_tokens, num_experts = logits_AE.shape
    offsets_E = logits_AE.new_zeros(num_experts)
    if num_tokens == 0:
        return offsets_E
    share = math.log(num_tokens / num_experts)
    for _ in range(iterations):
        scales_A1 = -(logits_AE + offsets_E).logsumexp(dim=1, keepdim=True)
        offsets_E = share - (logits_AE + scales_A1).logsumexp(dim=0)
    return offsets_E - offsets_E.mean()
