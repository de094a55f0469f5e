"""The routing decision: integers that are made once and reused by everything after them.

Shapes: T tokens of this rank, E experts, K places for choices a token has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Picked:
    """Which experts a router wants for each token, before capacity.

    Args:
        indices_TK: Expert of each place, ``(T, K)`` int64; the K of a token are distinct.
        chosen_TK: False where a place holds no choice (fewer experts than places, or the token
            is padding), ``(T, K)`` bool; None when every place does.
    """

    indices_TK: Tensor
    chosen_TK: Tensor | None = None

    def without_padding(self, valid_T: Tensor | None) -> Picked:
        """The same choices, none of them of padding tokens."""
        if valid_T is None:
            return self
        valid_TK = valid_T.unsqueeze(1).expand_as(self.indices_TK)
        chosen_TK = valid_TK if self.chosen_TK is None else valid_TK & self.chosen_TK
        return Picked(self.indices_TK, chosen_TK)

    def mask(self) -> Tensor:
        """``chosen_TK``, written out where it is None."""
        if self.chosen_TK is None:
            return torch.ones_like(self.indices_TK, dtype=torch.bool)
        return self.chosen_TK


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing decision of one layer for one micro-batch, with its weights.

    Args:
        indices_TK: Expert of each choice, ``(T, K)`` int64; the K of a token are distinct.
        probs_TK: Weight of each choice, ``(T, K)``, differentiable.
        num_experts: E.
        kept_TK: False where a choice is not carried out (none was made, over capacity, or the
            token is padding), ``(T, K)`` bool; None when every choice is.
        capacity: With padding to capacity, the rows that every expert takes from this rank.
    """

    indices_TK: Tensor
    probs_TK: Tensor
    num_experts: int
    kept_TK: Tensor | None = None
    capacity: int | None = None

    def tokens_per_expert(self) -> Tensor:
        """How many choices are carried out at each expert, ``(E,)`` int64."""
        return count_choices(self.indices_TK, self.num_experts, self.kept_TK)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Megatron's form: ``probs`` ``(T, E)`` and ``routing_map`` ``(T, E)`` bool."""
        kept_TK = Picked(self.indices_TK, self.kept_TK).mask()
        shape = (self.indices_TK.shape[0], self.num_experts)
        routing_map_TE = torch.zeros(shape, dtype=torch.bool, device=kept_TK.device)
        routing_map_TE = routing_map_TE.scatter(1, self.indices_TK, kept_TK)
        probs_TE = self.probs_TK.new_zeros(shape)
        return probs_TE.scatter(1, self.indices_TK, self.probs_TK * kept_TK), routing_map_TE


def count_choices(indices_TK: Tensor, num_experts: int, valid_TK: Tensor | None = None) -> Tensor:
    """Count choices per expert, ``(E,)`` int64; those where ``valid_TK`` is False are left out."""
    chosen = indices_TK.flatten() if valid_TK is None else indices_TK[valid_TK]
    return torch.bincount(chosen, minlength=num_experts)
