"""What a router counts as it decides, on its own device, without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_moe.route.decision import Picked, count_choices
from megatron_moe.route.part import RouterPart
from megatron_moe.route.tokens import Tokens


class Tally(RouterPart):
    """Counts since the last reset, of this rank, all int64; and two shares of each global batch.

    Args:
        num_experts: E.
        reports: Whether the shares are wanted, which takes three numbers of the batch's sums.
    """

    def __init__(self, num_experts: int, reports: bool) -> None:
        self.num_experts = num_experts
        self.reports = reports
        self.micro_batches = 0  # of the global batch that is going on
        # Choices given up, choices and tokens of the global batch that is going on.
        self._batch = torch.zeros(3, dtype=torch.int64)
        self.drop_rate = self.mean_k = 0.0
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
        dropped_E = torch.zeros_like(counts_E)
        if kept_TK is not picked.chosen_TK:
            dropped_E = counts_E - count_choices(picked.indices_TK, self.num_experts, kept_TK)
        valid_T, num_tokens = tokens.valid_T, tokens.logits_TE.shape[0]
        count = counts_E.new_tensor(num_tokens) if valid_T is None else valid_T.sum()
        self.load_E = self.load_E.to(device) + counts_E
        self.dropped_E = self.dropped_E.to(device) + dropped_E
        self.tokens = self.tokens.to(device) + count
        if self.reports:
            self._batch = self._batch.to(device)
            self._batch += torch.stack([dropped_E.sum(), counts_E.sum(), count])
        self.micro_batches += 1

    def summary(self) -> Tensor | None:
        """What this rank adds to the shares of the global batch."""
        return self._batch.double() if self.reports else None

    def end_batch(self, summed: Tensor | None) -> None:
        """Work out the shares: of all ranks' counts, since a mean of shares depends on the cut."""
        if summed is not None:
            dropped, choices, tokens = summed.tolist()
            self.drop_rate, self.mean_k = dropped / max(choices, 1), choices / max(tokens, 1)
            self._batch = torch.zeros_like(self._batch)

    def vector(self) -> Tensor:
        """All counts in one, ``(2E + 1,)``."""
        device = self.load_E.device
        return torch.cat([self.load_E, self.dropped_E.to(device), self.tokens.to(device)])
