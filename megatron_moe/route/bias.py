"""Balancing without a loss: a bias per expert that steers the choice and touches no weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_moe.route.decision import Picked, count_choices
from megatron_moe.route.part import RouterPart
from megatron_moe.route.tokens import Tokens


class ExpertBias(RouterPart):
    """After each global batch the bias of an expert goes up by a step if it had too little.

    ``sign``: ± the rate, as in the paper. ``centred``: the same with the mean of the steps taken
    off, so that biases cannot drift together. Counts are int64, so that no step has the wrong
    sign because large counts were rounded; the bias is fp32.

    Source: Wang et al. arXiv:2408.15664.
    """

    def __init__(self, config: Any, moe: Any) -> None:
        self.num_experts: int = config.num_moe_experts
        self.rate: float = config.moe_router_bias_update_rate
        self.update: str = moe.expert_bias_update
        self.frozen = False

    def buffers(self) -> dict[str, Tensor]:
        """Megatron's own key."""
        return {"expert_bias": torch.zeros(self.num_experts)}

    def ranking_bias(self, tokens: Tokens) -> Tensor:
        """``(E,)``, for every token."""
        return self.state["expert_bias"]

    def observe(self, tokens: Tokens, picked: Picked) -> None:
        """Count the choices where they are kept for Megatron, too."""
        counts_E = count_choices(picked.indices_TK, self.num_experts, picked.chosen_TK)
        self.state["local_tokens_per_expert"].add_(counts_E)

    def summary(self) -> Tensor:
        """The counts of the global batch."""
        return self.state["local_tokens_per_expert"].double()

    def end_batch(self, summed: Tensor | None) -> None:
        """Step towards balance."""
        assert summed is not None
        self.state["local_tokens_per_expert"].zero_()
        if self.frozen:
            return
        steps_E = torch.sign(summed.mean() - summed)
        if self.update == "centred":
            steps_E = steps_E - steps_E.mean()
        bias_E = self.state["expert_bias"]
        bias_E += self.rate * steps_E.to(bias_E)
