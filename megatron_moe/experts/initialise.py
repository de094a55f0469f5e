"""Initial weights of experts that do not depend on how experts are laid out.

Megatron's CPU initialisation draws every rank's experts from one common generator, so that expert
i of each expert-parallel rank starts as the same weights; and its GPU initialisation gives
different weights for each layout. Here an expert's weights follow from the model's seed and the
expert's *global* index, whatever EP and ETP are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw_seed() -> int:
    """One number from the default CPU generator, which TP, EP and DP ranks share."""
    return int(torch.randint(2**62, ()).item())


def initialise_expert(
    parts: Sequence[Tensor],
    init_method: Callable[[Tensor], object],
    seed: int,
    *,
    shard_dim: int,
    shard_rank: int,
    num_shards: int,
) -> None:
    """Fill one expert's weight from a seed of its own.

    Args:
        parts: The weight's parts that are sharded apart: one, or the gate and linear halves.
        init_method: Fills a full matrix in place from the default generator.
        seed: Of this expert and weight.
        shard_dim: The dimension cut over ETP.
        shard_rank: This rank's slice.
        num_shards: ETP size.

    Cost: the full, unsharded matrix in fp32, once.
    """
    shape = list(parts[0].shape)
    shape[shard_dim] *= num_shards
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        full = torch.empty(len(parts), *shape, dtype=torch.float32)
        for part, whole in zip(parts, full, strict=True):
            init_method(whole)
            part.copy_(whole.chunk(num_shards, dim=shard_dim)[shard_rank])
