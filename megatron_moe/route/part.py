"""What a router is made of: parts with state, each told of every decision and of every batch's end.

The choice is a part; so are the expert bias, the schedule and the stability measures. State that
must survive a restart is in buffers of the router, in fp32 or int64, the same on all ranks: a part
changes it at the end of a global batch only, from sums over all ranks, so that it does not depend
on the layout and a checkpoint can be loaded into another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_moe.route.decision import Picked
from megatron_moe.route.tokens import Tokens


class OwnLoss(NamedTuple):
    """A loss that a part brings itself.

    Args:
        name: What it is logged as.
        coeff: What it is multiplied with.
        value: This rank's summand: summed over the micro-batch's ranks it is the loss.
    """

    name: str
    coeff: float
    value: Tensor


class RouterPart:
    """A part of a router; every method may be left as it is."""

    # The router's buffers, in which those of :meth:`buffers` are found by key.
    state: Mapping[str, Any] = {}

    # What a part must be given of the vocabulary ids, which the layers themselves never see.
    needs_token_ids = False
    needs_contexts = False

    def buffers(self) -> dict[str, Tensor]:
        """State that belongs in a checkpoint, by key, in fp32 or int64: asked for once.

        The router registers it; from then on :attr:`state` has it, to be changed in place.
        """
        return {}

    def ranking_bias(self, tokens: Tokens) -> Tensor | None:
        """What to add to the values that experts are ranked by: ``(E,)``, ``(T, E)`` or None."""
        return None

    def observe(self, tokens: Tokens, picked: Picked) -> None:
        """Take note of a decision: called once for each micro-batch of training."""

    def losses(self, tokens: Tokens, picked: Picked) -> list[OwnLoss]:
        """Losses of its own; every rank calls this together."""
        return []

    def summary(self) -> Tensor | None:
        """What this rank adds to the global batch's sums, fp64, 1-D; None for nothing."""
        return None

    def end_batch(self, summed: Tensor | None) -> None:
        """Update the state after a global batch, from the sums of all ranks' summaries.

        Every rank calls this together, in the same order of layers and parts.
        """


def end_global_batch(parts: list[RouterPart], group: Any) -> None:
    """Sum all parts' summaries over the ranks by one all-reduce, and let each update its state.

    Args:
        parts: Of all routers of this pipeline stage, in an order that all ranks share.
        group: The ranks that share the global batch.
    """
    summaries = [part.summary() for part in parts]
    given = [s for s in summaries if s is not None]
    if given:
        sums = torch.cat([s.double() for s in given])
        if group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
        split = iter(sums.split([s.numel() for s in given]))
    for part, summary in zip(parts, summaries, strict=True):
        part.end_batch(None if summary is None else next(split))
