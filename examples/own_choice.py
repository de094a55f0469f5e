"""A choice of experts of your own, from outside the package.

    megatron-moe run --device cpu -n 2 examples/pretrain_gpt.py --num-experts 8 … \
        --moe-router-choice own_choice:NoisyTopK

The module is found beside the training script, or anywhere on the Python path.

``pick`` says which experts, as integers and without gradient; it is asked once for each token, and
what it answers is kept for dispatch, losses, counts and recompute. Weights come from ``weigh``,
which is left as it is here.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.route.choice import Choice, register
from megatron_moe.route.decision import Picked
from megatron_moe.route.tokens import Tokens


@register("noisy_topk")
class NoisyTopK(Choice):
    """The K best after Gumbel noise: experts are sampled by their softmax, without replacement."""

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """What in the options cannot work together, one sentence each."""
        ok = config.moe_router_score_function == "softmax"
        return [] if ok else ["NoisyTopK needs moe_router_score_function softmax"]

    def pick(self, tokens: Tokens) -> Picked:
        """Noise in training only."""
        ranked_TE = tokens.logits_TE.detach().float()
        if tokens.training:
            ranked_TE = ranked_TE - torch.empty_like(ranked_TE).exponential_().log()
        return Picked(ranked_TE.topk(self.topk, dim=-1).indices)
