"""Hysteresis: the experts last chosen in the same context keep a margin.

A cache maps a context (a token with the few before it, hashed) to the experts chosen there last.
While training, those experts get ``hysteresis_margin`` added to what experts are ranked by, in the
unit of the ranking: logits where softmax follows the choice, else scores. A choice then changes
only where the router has changed its mind by more than that. The margin touches no weight, and the
router is free: the context alone never decides.

The cache that a batch is decided with is the one left by the batch before, merged over all ranks
in a way that no order of ranks or tokens can change. So it is the same in every layout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.choice import Choice
from megatron_moe.route.choices.hashing import mix
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import RouterPart
from megatron_moe.route.tokens import Tokens

_SLOTS = 2**14
_NOBODY = -1


class Hysteresis(RouterPart):
    """The cache of contexts, what it adds to the ranking, and the churn on repeated contexts.

    Of two contexts that fall on one slot the newer one stays.

    Args:
        margin: What is added.
        choice: The choice whose decisions are kept.
        groups: The layer's.

    Cost: three all-reduces of 16,384 · (K + 2) integers after each global batch.
    """

    needs_contexts = True

    def __init__(self, margin: float, choice: Choice, groups: ExpertGroups) -> None:
        self.margin = margin
        self.places = choice.places
        self.num_experts = choice.num_experts
        self.groups = groups
        self._contexts: list[Tensor] = []
        self._experts: list[Tensor] = []
        self._changed = torch.zeros(2, dtype=torch.float64)
        self.repeat_churn: float | None = None

    def buffers(self) -> dict[str, Tensor]:
        """Which context each slot holds, and its experts."""
        return {
            "context_tags": torch.zeros(_SLOTS, dtype=torch.int64),
            "context_experts": torch.full((_SLOTS, self.places), _NOBODY, dtype=torch.int32),
        }

    def ranking_bias(self, tokens: Tokens) -> Tensor | None:
        """The margin on the cached experts, ``(T, E)``; None in evaluation."""
        if not tokens.training:
            return None
        known_TK = self._known(tokens)
        bias_TE = torch.zeros_like(tokens.logits_TE)
        margin_TK = self.margin * (known_TK != _NOBODY).to(bias_TE.dtype)
        return bias_TE.scatter_add(1, known_TK.clamp(min=0), margin_TK)

    def observe(self, tokens: Tokens, picked: Picked) -> None:
        """Note decisions for the cache, and how they differ from what it held."""
        assert tokens.contexts_T is not None
        made_TK = picked.mask()
        experts_TK = torch.where(made_TK, picked.indices_TK, _NOBODY)
        known_TK = self._known(tokens)
        again_T = (known_TK != _NOBODY).any(1)
        stayed_TK = (experts_TK.unsqueeze(2) == known_TK.unsqueeze(1)).any(2)
        repeated_TK = made_TK & again_T.unsqueeze(1)
        changed = torch.stack([(repeated_TK & ~stayed_TK).sum(), repeated_TK.sum()])
        self._changed = self._changed.to(changed.device) + changed
        some_T = made_TK.any(1)
        self._contexts.append(tokens.contexts_T[some_T])
        # Sorted, so that one set of experts is one decision.
        self._experts.append(experts_TK[some_T].sort(1, descending=True).values)

    def summary(self) -> Tensor:
        """Changed and all choices in contexts that were known."""
        return self._changed.to(self._tags().device)

    def end_batch(self, summed: Tensor | None) -> None:
        """Merge the batch's decisions of all ranks into the cache."""
        assert summed is not None
        self.repeat_churn = float(summed[0] / summed[1]) if summed[1] else None
        tags, experts = self._tags(), self.state["context_experts"]
        contexts_N = torch.cat([*self._contexts, tags.new_empty(0)])
        experts_NK = torch.cat([*self._experts, tags.new_empty((0, self.places))])
        slots_N = contexts_N & (_SLOTS - 1)
        weight_N = _weight(contexts_N, experts_NK)
        heaviest = torch.full_like(tags, _NOBODY).scatter_reduce(0, slots_N, weight_N, "amax")
        heaviest = self._largest(heaviest)
        wins_N = heaviest[slots_N] == weight_N
        new_tags = torch.full_like(tags, torch.iinfo(torch.int64).min)
        new_tags[slots_N[wins_N]] = contexts_N[wins_N]
        new_experts = torch.full_like(experts, _NOBODY)
        new_experts[slots_N[wins_N]] = experts_NK[wins_N].to(experts.dtype)
        new_tags, new_experts = self._largest(new_tags), self._largest(new_experts)
        written = heaviest != _NOBODY
        tags[written] = new_tags[written]
        experts[written] = new_experts[written]
        self._contexts, self._experts = [], []
        self._changed = torch.zeros_like(self._changed)

    def _tags(self) -> Tensor:
        return self.state["context_tags"]

    def _known(self, tokens: Tokens) -> Tensor:
        """Experts that the cache holds for each token's context, ``(T, K)`` int64, -1 for none."""
        assert tokens.contexts_T is not None
        slots_T = tokens.contexts_T & (_SLOTS - 1)
        hit_T = self._tags()[slots_T] == tokens.contexts_T
        return torch.where(
            hit_T.unsqueeze(1), self.state["context_experts"][slots_T].long(), _NOBODY
        )

    def _largest(self, x: Tensor) -> Tensor:
        if self.groups.tp_dp_cp.size() > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.groups.tp_dp_cp)
        return x


def _weight(contexts_N: Tensor, experts_NK: Tensor) -> Tensor:
    """A number of each decision that decides who stays in a slot: non-negative, order-free."""
    weight_N = mix(contexts_N)
    for column_N in experts_NK.unbind(1):
        weight_N = mix(weight_N + column_N)
    return weight_N & (2**62 - 1)


def hash_contexts(ids_BS: Tensor, length: int) -> Tensor:
    """Hash each token with the ``length - 1`` before it in its sequence, ``(B, S)`` int64.

    Near a sequence's start the context is shorter. No hash is 0, which stands for an empty slot.
    """
    hashed_BS = torch.zeros_like(ids_BS)
    for back in range(length):
        earlier_BS = torch.full_like(ids_BS, _NOBODY)
        earlier_BS[:, back:] = ids_BS[:, : ids_BS.shape[1] - back]
        hashed_BS = mix(hashed_BS + earlier_BS + 1)
    return torch.where(hashed_BS == 0, 1, hashed_BS)


def hysteresis_of(choice: Choice, moe: Any, groups: ExpertGroups) -> Hysteresis | None:
    """The cache that the options ask for."""
    return Hysteresis(moe.hysteresis_margin, choice, groups) if moe.hysteresis_margin else None
