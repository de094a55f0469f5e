"""Experts choose tokens: every expert takes its best ones, so the load is equal by construction.

Whether a token is taken depends on the other tokens of the scope, later ones too. A language
model trained this way reads the future through the routing, and its loss is worth nothing;
``allow_future_tokens`` says that this is known (encoders, ablations).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.scope import Gathered, gather_scope, ranks_of
from megatron_moe.route.scores import balance_scores
from megatron_moe.route.tokens import Tokens


class ExpertChoice(Choice):
    """Each expert takes the ⌈n · K / E⌉ tokens of the scope that score it highest.

    ``expert_choice_scope`` says whose tokens compete: those of the micro-batch, of each sequence
    for itself, or of the data-parallel ranks' micro-batches together (``global``). A token may get
    any number of experts, none too: it then passes by the residual connection.

    Cost: an all-gather of ``(T, E)`` scores over the scope's ranks.
    Source: Zhou et al. arXiv:2202.09368.
    """

    sees_future = True
    balanced = True
    ranks_with_bias = False
    ignores = ("moe_router_group_topk", "moe_router_enable_expert_bias")
    decides_alone = False

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """Expert choice has its own capacity, and reads the future."""
        faults = []
        if not moe.allow_future_tokens:
            faults.append(
                "router_choice expert_choice lets a token's experts depend on later tokens, which "
                "a causal language model must not see; use router_choice topk, or add "
                "--moe-allow-future-tokens if the model is not causal"
            )
        if config.moe_expert_capacity_factor is not None:
            faults.append(
                f"moe_expert_capacity_factor ({config.moe_expert_capacity_factor}) has no meaning "
                "with router_choice expert_choice, where each expert takes its share: drop it"
            )
        return faults

    @property
    def places(self) -> int:
        """Every expert may take a token."""
        return self.num_experts

    def pick(self, tokens: Tokens) -> Picked:
        """Let experts take their best tokens; an earlier token wins a tie."""
        scope = self.moe.expert_choice_scope
        scores_TE = balance_scores(tokens.logits_TE, self.config.moe_router_score_function)
        everyone = gather_scope(scores_TE, tokens.valid_T, ranks_of(scope, self.groups))
        columns = tokens.num_sequences if scope == "sequence" else 1
        taken_AE = _taken(everyone, columns, self.topk)
        experts_E = torch.arange(self.num_experts, device=taken_AE.device)
        chosen_TE = taken_AE[everyone.mine]
        return Picked(experts_E.expand(chosen_TE.shape), chosen_TE)

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """The token's score of each expert, over all experts."""
        scores_TE = balance_scores(logits_TE, self.config.moe_router_score_function)
        factor = self.config.moe_router_topk_scaling_factor or 1.0
        return (scores_TE * factor).type_as(logits_TE)


def _taken(everyone: Gathered, columns: int, topk: int) -> Tensor:
    """Which tokens each expert takes, ``(A, E)`` bool; each column competes for itself."""
    scores_ABE = everyone.rows.unflatten(0, (-1, columns))
    num_rows, _, num_experts = scores_ABE.shape
    num_valid_B = torch.full((columns,), num_rows, device=scores_ABE.device)
    if everyone.valid_A is not None:
        valid_AB = everyone.valid_A.unflatten(0, (-1, columns))
        num_valid_B = valid_AB.sum(0)
        scores_ABE = scores_ABE.masked_fill(~valid_AB.unsqueeze(-1), -1.0)
    order_ABE = scores_ABE.argsort(dim=0, descending=True, stable=True)
    capacity_B = (num_valid_B * topk + num_experts - 1) // num_experts
    capacity_B = torch.minimum(capacity_B, num_valid_B)
    ranks_A = torch.arange(num_rows, device=scores_ABE.device).view(-1, 1, 1)
    within_ABE = (ranks_A < capacity_B.view(1, -1, 1)).expand_as(order_ABE)
    return torch.zeros_like(within_ABE).scatter(0, order_ABE, within_ABE).flatten(0, 1)
