"""Stacked expert weights in Megatron's distributed checkpoints.

Megatron stores ``…experts.linear_fc1.weight`` as one global tensor with a leading expert axis, one
chunk an expert, and the gate and linear halves of a gated layer as separate chunks of one axis.
A stack of e experts is a bigger chunk of the same tensor, so checkpoints of sequential, Transformer
Engine and stacked experts read one another, optimizer state included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """Which slice of all experts this rank holds."""

    ep: ProcessGroup
    etp: ProcessGroup
    edp: ProcessGroup | None
    num_local: int


def sharded_stack(
    stack: Tensor,
    prefix: str,
    name: str,
    shard: ExpertShard,
    sharded_offsets: tuple,
    *,
    gated: bool,
    sharded_axis: int | None,
    singleton: bool,
) -> ShardedStateDict:
    """Describe one stacked parameter.

    Args:
        stack: ``(e, …)``.
        prefix: Of the experts module, ending with a dot.
        name: ``linear_fc1.weight`` and so on.
        shard: This rank's place.
        sharded_offsets: Axes that Megatron prepends (layers).
        gated: Whether axis 0 of one expert holds gate ‖ linear.
        sharded_axis: Axis of one expert cut over ETP; None where every ETP rank holds all.
        singleton: Megatron's ``singleton_local_shards``: one key an expert.

    Returns:
        One entry, under a key of this module.
    """
    place = _Place(name, prefix, shard, sharded_offsets, gated, sharded_axis, singleton)
    if not gated and not singleton:
        return {f"{prefix}{name}": place.tensor(f"{prefix}experts.{name}", stack, None)}
    return {
        f"{prefix}{name}": ShardedTensorFactory(
            f"{prefix}experts.{name}",
            stack,
            place.build,
            place.merge,
            place.replica_id(),
        )
    }


def empty_extra_states(
    prefix: str, layer: str, shard: ExpertShard, sharded_offsets: tuple
) -> ShardedStateDict:
    """The (empty) FP8 state of each expert's linear layer, which other expert layers ask for.

    Args:
        prefix: Of the experts module, ending with a dot.
        layer: ``linear_fc1`` or ``linear_fc2``.
        shard: This rank's place.
        sharded_offsets: Axes that Megatron prepends (layers).
    """
    out: ShardedStateDict = {}
    total = shard.ep.size() * shard.num_local
    edp_rank = shard.edp.rank() if shard.edp is not None else 0
    for i in range(shard.num_local):
        at = (len(sharded_offsets), shard.ep.rank() * shard.num_local + i, total)
        out[f"{prefix}{layer}._extra_state{i}"] = make_sharded_object_for_checkpoint(
            None,
            f"{prefix}experts.{layer}._extra_state",
            (*sharded_offsets, at),
            replica_id=(0, shard.etp.rank(), edp_rank),
        )
    return out


@dataclass(frozen=True)
class _Place:
    name: str
    prefix: str
    shard: ExpertShard
    offsets: tuple
    gated: bool
    axis: int | None
    singleton: bool

    def replica_id(self) -> tuple[int, int, int]:
        """(PP, TP, DP) replica: experts differ over ETP where sharded, repeat over EDP."""
        tp = 0 if self.axis is not None else self.shard.etp.rank()
        return (0, tp, self.shard.edp.rank() if self.shard.edp is not None else 0)

    def tensor(
        self, key: str, data: Tensor, half: int | None, replica_id: Any = None, one: bool = False
    ) -> ShardedTensor:
        """One chunk: a stack of experts, or one expert's own tensor."""
        before = len(self.offsets)
        offsets = list(self.offsets)
        if not one:
            offsets.append((before, self.shard.ep.rank(), self.shard.ep.size()))
        if self.axis is not None:
            axis = before + self.axis + (0 if one else 1)
            rank, size = self.shard.etp.rank(), self.shard.etp.size()
            if half is not None:
                # The two halves follow one another along the axis, unless they have own keys.
                offsets.append(
                    (axis, rank, size) if self.singleton else (axis, rank + half * size, 2 * size)
                )
            elif size > 1:
                offsets.append((axis, rank, size))
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *offsets,
            replica_id=replica_id or self.replica_id(),
            prepend_axis_num=before,
        )

    def build(self, key: str, stack: Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
        """Chunks of a stack; ``key`` may carry an optimizer's prefix."""
        if not self.singleton:
            halves = stack.chunk(2, dim=1)
            return [self.tensor(key, h, i, replica_id) for i, h in enumerate(halves)]
        first = self.shard.ep.rank() * self.shard.num_local
        chunks = []
        for i, expert in enumerate(stack.unbind(0)):
            own = key.replace(f"experts.{self.name}", f"experts.{first + i}.{self.name}")
            if not self.gated:
                chunks.append(self.tensor(own, expert, None, replica_id, one=True))
                continue
            for half, (suffix, part) in enumerate(zip("wv", expert.chunk(2), strict=True)):
                chunks.append(self.tensor(f"{own}_{suffix}", part, half, replica_id, one=True))
        return chunks

    def merge(self, chunks: list[Tensor]) -> Tensor:
        """The stack again."""
        with torch.no_grad():
            if not self.singleton:
                return torch.cat(chunks, dim=1)
            if not self.gated:
                return torch.stack(chunks)
            pairs = zip(chunks[::2], chunks[1::2], strict=True)
            return torch.stack([torch.cat(pair) for pair in pairs])
