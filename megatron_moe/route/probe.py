"""Churn: how much the decisions about the same inputs change while the router learns.

A fixed probe (the router's inputs for the first tokens of the first batch) is decided anew after
each global batch, and the last 128 decisions are kept in a ring. Churn is the share of a token's
experts that were not among those it had before: after the last batch, or over the whole ring. Only
the router's own drift is seen this way, not that of the hidden states below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.parallel.groups import ExpertGroups
from megatron_moe.route.choice import Choice
from megatron_moe.route.decision import Picked
from megatron_moe.route.part import RouterPart
from megatron_moe.route.tokens import Tokens

RING = 128
_NOBODY = -1


class Probe(RouterPart):
    """The probe, and the ring of what was decided about it.

    Args:
        num_tokens: M, the size of the probe.
        num_features: D.
        places: K, the places for choices of a token.
        decide: Inputs ``(M, D)`` to choices, as in evaluation.
        groups: The layer's.

    Cost: a gate and a choice of M tokens after each global batch, on every rank; M · D numbers and
    128 · M · K integers in the checkpoint.
    """

    def __init__(
        self,
        num_tokens: int,
        num_features: int,
        places: int,
        decide: Callable[[Tensor], Picked],
        groups: ExpertGroups,
    ) -> None:
        self.shape = (num_tokens, num_features)
        self.places = places
        self.decide = decide
        self.groups = groups
        self._seen: Tensor | None = None
        self._settled: bool | None = None

    def buffers(self) -> dict[str, Tensor]:
        """The inputs, the ring, and how many decisions it has taken."""
        ring = torch.full((RING, self.shape[0], self.places), _NOBODY, dtype=torch.int32)
        return {
            "probe_inputs": torch.zeros(self.shape),
            "probe_ring": ring,
            "probe_count": torch.zeros(1, dtype=torch.int64),
        }

    def observe(self, tokens: Tokens, picked: Picked) -> None:
        """Take the first tokens ever seen as the probe."""
        if self._settled is None:  # asks the host once, after a checkpoint has been loaded
            self._settled = int(self.state["probe_count"]) > 0
        if self._seen is None and not self._settled:
            assert tokens.inputs_TD is not None
            valid_T = tokens.valid_T
            rows = tokens.inputs_TD if valid_T is None else tokens.inputs_TD[valid_T]
            self._seen = rows[: self.shape[0]].detach().float().clone()

    def end_batch(self, summed: Tensor | None) -> None:
        """Decide about the probe and enter it into the ring."""
        count = int(self.state["probe_count"])
        if count == 0 and not self._settle():
            return
        picked = self.decide(self.state["probe_inputs"])
        indices_MK = torch.where(picked.mask(), picked.indices_TK, _NOBODY)
        self.state["probe_ring"][count % RING].copy_(indices_MK)
        self.state["probe_count"].fill_(count + 1)

    def churn(self, back: int = 1) -> float | None:
        """Share of choices that differ from those of ``back`` batches ago.

        Returns:
            None where the ring does not reach back so far.
        """
        count = int(self.state["probe_count"])
        if not 0 < back < min(count, RING):
            return None
        ring = self.state["probe_ring"]
        return changed_share(ring[(count - 1) % RING], ring[(count - 1 - back) % RING])

    def _settle(self) -> bool:
        """Give all ranks the first rank's tokens, repeated if it had fewer than the probe has."""
        inputs = self.state["probe_inputs"]
        group, seen = self.groups.tp_dp_cp, self._seen
        found = torch.zeros(1, dtype=torch.int64, device=inputs.device)
        if group.rank() == 0 and seen is not None and len(seen):
            inputs.copy_(seen[torch.arange(len(inputs), device=seen.device) % len(seen)])
            found.fill_(1)
        if group.size() > 1:
            first = dist.get_global_rank(group, 0)
            dist.broadcast(found, src=first, group=group)
            dist.broadcast(inputs, src=first, group=group)
        self._seen, self._settled = None, bool(found)
        return self._settled


def changed_share(now_MK: Tensor, before_MK: Tensor) -> float:
    """Share of the choices now that were not made before, whatever their order; -1 is no choice."""
    kept_MK = (now_MK.unsqueeze(2) == before_MK.unsqueeze(1)).any(2)
    made_MK = now_MK != _NOBODY
    return float((made_MK & ~kept_MK).sum()) / max(int(made_MK.sum()), 1)


def probe_of(
    choice: Choice, config: Any, moe: Any, decide: Callable[[Tensor], Picked]
) -> Probe | None:
    """The probe that the options ask for."""
    if not moe.probe_tokens:
        return None
    return Probe(moe.probe_tokens, config.hidden_size, choice.places, decide, choice.groups)
