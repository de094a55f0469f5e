"""No router: a token's experts are a hash of its id. A baseline to measure routers by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.tokens import Tokens
from megatron_moe.route.topk import best_experts


class Hash(Choice):
    """K experts by hash, each with weight 1/K; the gate learns nothing.

    Source: Roller et al. arXiv:2106.04426.
    """

    needs_token_ids = True
    balanced = True
    ranks_with_bias = False
    decides_alone = False
    ignores = (
        "moe_router_group_topk",
        "moe_router_enable_expert_bias",
        "moe_router_topk_scaling_factor",
    )

    @classmethod
    def faults(cls, config: Any, moe: Any) -> list[str]:
        """Only the first pipeline stage knows the token ids."""
        if config.pipeline_model_parallel_size > 1:
            return [
                "router_choice hash needs the token ids, which only the first pipeline stage has: "
                f"pipeline_model_parallel_size ({config.pipeline_model_parallel_size}) must be 1"
            ]
        return []

    def pick(self, tokens: Tokens) -> Picked:
        """The K experts whose hash with the token is highest: distinct, and uniform over tokens."""
        assert tokens.token_ids_T is not None
        experts_E = torch.arange(self.num_experts, device=tokens.token_ids_T.device)
        mixed_TE = mix(tokens.token_ids_T.unsqueeze(1) * self.num_experts + experts_E)
        # 24 bits are exact in fp32, and enough that ties are rare.
        return Picked(best_experts((mixed_TE & 0xFFFFFF).float(), self.topk))

    def weigh(self, logits_TE: Tensor, picked: Picked) -> Tensor:
        """1/K; the gate stays in the graph with a gradient of zero, as data parallelism asks."""
        return logits_TE.gather(1, picked.indices_TK) * 0.0 + 1.0 / self.topk


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values (splitmix64's finaliser); negative results are possible."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
