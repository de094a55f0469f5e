"""Two expert-parallel processes: what a step of each layer sends, in how many collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.tools.bench.clock import Clock
from megatron_moe.tools.bench.phases import time_phases

if TYPE_CHECKING:
    from megatron_moe.tools.bench.sides import Sides

# Methods of a process group, through which every collective goes, however it was imported: what
# each is called, and the place of its input among the arguments.
COLLECTIVES = {
    "all_to_all_single": ("all-to-all", 1),
    "alltoall": ("all-to-all", 1),
    "allgather": ("all-gather", 1),
    "all_gather_single": ("all-gather", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "allreduce": ("all-reduce", 0),
    "broadcast": ("broadcast", 0),
}


@dataclass(slots=True)
class Traffic:
    """Collectives among two or more ranks, by kind.

    Args:
        calls: How many.
        bytes: That this rank put in, its own share included.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives of this process while in force."""
    traffic = Traffic()

    def wrapped(method: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, method)
        kind, place = COLLECTIVES[method]

        def call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if group.size() > 1:
                traffic.calls[kind] += 1
                traffic.bytes[kind] += sum(_sizes(args[place]))
            return original(group, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for method in COLLECTIVES:
            replaced = patch.object(dist.ProcessGroup, method, wrapped(method))
            stack.enter_context(replaced)
        yield traffic


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    else:
        for one in value:
            yield from _sizes(one)


def measure_traffic(sides: Sides, rounds: int, clock: Clock) -> dict[str, dict[str, Any]]:
    """Count and time the exchange of each side.

    Returns:
        By side: ``calls`` and ``bytes`` of one forward and backward by collective, and
        ``exchange``, the seconds of the exchange phase on this rank.
    """
    out: dict[str, dict[str, Any]] = {}
    phases = time_phases(sides, rounds, clock)
    for name in phases:
        with counted() as traffic:
            sides.step(name)()
        out[name] = {
            "calls": dict(traffic.calls),
            "bytes": dict(traffic.bytes),
            "exchange": phases[name]["exchange"],
        }
    return out


def all_agree(value: float) -> float:
    """The largest of all ranks' values, so that every rank decides alike."""
    worst = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()
