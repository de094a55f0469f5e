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
        self.micro_batches = 0  # of the global batch that is going on
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
        self.last_load_E, self.last_dropped_E = counts_E, torch.zeros_like(counts_E)
        if kept_TK is not picked.chosen_TK:
            kept_E = count_choices(picked.indices_TK, self.num_experts, kept_TK)
            self.last_dropped_E = counts_E - kept_E
        valid_T, num_tokens = tokens.valid_T, tokens.logits_TE.shape[0]
        self.last_tokens = counts_E.new_tensor(num_tokens) if valid_T is None else valid_T.sum()
        self.load_E = self.load_E.to(device) + counts_E
        self.dropped_E = self.dropped_E.to(device) + self.last_dropped_E
        self.tokens = self.tokens.to(device) + self.last_tokens
        self.micro_batches += 1

    def last_drop_rate(self) -> Tensor:
        """Share of the last micro-batch's choices that were given up."""
        return self.last_dropped_E.sum() / self.last_load_E.sum().clamp(min=1)

    def last_mean_k(self) -> Tensor:
        """Choices a token of the last micro-batch made."""
        return self.last_load_E.sum() / self.last_tokens.clamp(min=1)

    def vector(self) -> Tensor:
        """All counts in one, ``(2E + 1,)``."""
        device = self.load_E.device
        return torch.cat([self.load_E, self.dropped_E.to(device), self.tokens.to(device)])
