"""What routers counted, summed over the ranks that share a pipeline stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """Training decisions of one layer since the last reset.

    Args:
        load_E: Choices of each expert, ``(E,)`` int64, before capacity: where tokens wanted to go.
        dropped_E: Choices that were given up because the expert was full.
        tokens: Valid tokens.
        churn: Share of choices on the fixed probe that differ from the batch before; None without
            a probe.
    """

    load_E: Tensor
    dropped_E: Tensor
    tokens: int
    churn: float | None = None

    @property
    def choices(self) -> int:
        """All choices made."""
        return int(self.load_E.sum())

    @property
    def mean_k(self) -> float:
        """Choices a token."""
        return self.choices / self.tokens if self.tokens else 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the choices that were given up."""
        return int(self.dropped_E.sum()) / self.choices if self.choices else 0.0


def routing_counts(model: Any, *, reset: bool = False) -> dict[int, RoutingCounts]:
    """Read the counts of the whole run since the last reset.

    Args:
        model: A module, or Megatron's list of model chunks.
        reset: Start counting anew.

    Returns:
        For each MoE layer of this pipeline stage, by its 1-based number. Padding is not counted.

    Cost: one all-reduce of 2E + 1 integers a layer; all ranks of a stage must call it together.
    """
    out: dict[int, RoutingCounts] = {}
    for router in routers_of(model):
        counts = router.tally.vector().clone()
        if router.groups.tp_dp_cp.size() > 1:
            dist.all_reduce(counts, group=router.groups.tp_dp_cp)
        load_E, dropped_E, tokens = counts.cpu().split([router.num_experts] * 2 + [1])
        out[router.layer_number] = RoutingCounts(
            load_E=load_E, dropped_E=dropped_E, tokens=int(tokens), churn=router.churn
        )
        if reset:
            router.tally.reset()
    return out


def expert_load(model: Any, *, reset: bool = False) -> dict[int, Tensor]:
    """The loads alone, ``(E,)`` int64 by layer number; see :func:`routing_counts`."""
    return {n: counts.load_E for n, counts in routing_counts(model, reset=reset).items()}


def routers_of(model: Any) -> list[Any]:
    """Our routers in a module or a list of chunks, in the order of the modules."""
    chunks: Iterable[Any] = model if isinstance(model, list | tuple) else [model]
    return [m for chunk in chunks for m in chunk.modules() if hasattr(m, "tally")]
