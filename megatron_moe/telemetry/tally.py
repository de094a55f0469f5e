"""What a router counts as it decides, on its own device, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.route.decision import Picked, count_choices
from megatron_moe.route.tokens import Tokens


class Tally:
    """Counts since the last reset, of this rank, all int64.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.load_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self.dropped_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self.tokens = torch.zeros(1, dtype=torch.int64)

    def add(self, tokens: Tokens, picked: Picked, kept_TK: Tensor | None) -> None:
        """Count one micro-batch: choices before capacity, those given up, valid tokens."""
        counts_E = count_choices(picked.indices_TK, self.num_experts, picked.chosen_TK)
        device = counts_E.device
        self.load_E = self.load_E.to(device) + counts_E
        if kept_TK is not picked.chosen_TK:
            kept_E = count_choices(picked.indices_TK, self.num_experts, kept_TK)
            self.dropped_E = self.dropped_E.to(device) + counts_E - kept_E
        valid_T = tokens.valid_T
        self.tokens = self.tokens.to(device) + (
            tokens.logits_TE.shape[0] if valid_T is None else valid_T.sum()
        )

    def vector(self) -> Tensor:
        """All counts in one, ``(2E + 1,)``."""
        device = self.load_E.device
        return torch.cat([self.load_E, self.dropped_E.to(device), self.tokens.to(device)])
