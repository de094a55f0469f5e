"""Decisions that are made in one pass and needed again in another.

Activation recompute runs a layer twice: without gradient, then again in the backward pass. On a GPU
the second input may differ in the last bits, and a near-tie then falls the other way: dispatch and
gradient would belong to two different decisions. So the first pass leaves its integers here, and
the second takes them back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.route.decision import Picked

_SAMPLED_TOKENS = 64
_MOST_ENTRIES = 256  # more micro-batches than any pipeline has in flight
_ROUNDING = 1e-3
_SAME_PASS = 0.25  # of the spread of the logits; other micro-batches are several times as far away


@dataclass(frozen=True, slots=True)
class Decision:
    """What a pass decided.

    Args:
        picked: The choices.
        kept_TK: Which are carried out, as in ``Routing``.
        capacity: As in ``Routing``.
    """

    picked: Picked
    kept_TK: Tensor | None
    capacity: int | None


class DecisionMemory:
    """Decisions of passes that are to be computed again, recognised by a sample of their logits.

    Pipelines and repeated layers compute micro-batches again in different orders, so the order of
    the calls does not say which one is meant.
    """

    def __init__(self) -> None:
        self._entries: deque[tuple[Tensor, int, Decision]] = deque(maxlen=_MOST_ENTRIES)

    def __len__(self) -> int:
        """Decisions not taken back yet."""
        return len(self._entries)

    def keep(self, logits_TE: Tensor, decision: Decision) -> None:
        """Leave a decision for the second pass."""
        self._entries.append((_sample(logits_TE), logits_TE.shape[0], decision))

    def take(self, logits_TE: Tensor) -> Decision | None:
        """Take back the decision that was made from (nearly) these logits; None if there is none.

        Cost: a comparison of at most 64 tokens with each waiting micro-batch, and a host sync,
        where any is waiting.
        """
        sample = _sample(logits_TE)
        alike = [i for i, (_, n, _) in enumerate(self._entries) if n == logits_TE.shape[0]]
        if not alike:
            return None
        far = torch.stack([(self._entries[i][0] - sample).abs().mean() for i in alike]).nan_to_num()
        best = int(far.argmin())
        spread = (sample - sample.mean(0)).abs().mean().nan_to_num()
        # Tokens that are all alike have no spread, and rounding still makes them differ.
        if far[best] > _SAME_PASS * spread + _ROUNDING * sample.abs().mean():
            return None
        decision = self._entries[alike[best]][2]
        del self._entries[alike[best]]
        return decision

    def clear(self) -> None:
        """Forget everything, at the end of a global batch."""
        self._entries.clear()


def _sample(logits_TE: Tensor) -> Tensor:
    step = max(1, -(-logits_TE.shape[0] // _SAMPLED_TOKENS))
    return logits_TE.detach()[::step].clone()
