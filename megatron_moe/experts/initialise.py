"""Initial weights of experts that do not depend on how experts are laid out.

Megatron's CPU initialisation draws every rank's experts from one common generator, so that expert
i of each expert-parallel rank starts as the same weights; and its GPU initialisation gives
different weights for each layout. Here an expert's weights follow from the model's seed and the
expert's *global* index, whatever EP and ETP are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def draw_seed() -> int:
    """One number from the default CPU generator, which TP, EP and DP ranks share."""
    return int(torch.randint(2**62, ()).item())


def initialise_experts(
    weights: Iterable[tuple[Tensor, Tensor]], config: Any, ep: Any, etp: Any, seed: int
) -> None:
    """Fill the two weights of each local expert.

    Args:
        weights: First and second linear layer's, expert after expert; this rank's slices.
        config: Megatron's; gives the distributions and says whether experts are gated.
        ep: Process group of expert parallelism.
        etp: Of expert tensor parallelism.
        seed: Of the layer.
    """
    weights = list(weights)
    shard = {"shard_rank": etp.rank(), "num_shards": etp.size()}
    for i, (fc1, fc2) in enumerate(weights, start=ep.rank() * len(weights)):
        halves = fc1.chunk(2) if config.gated_linear_unit else (fc1,)
        initialise_expert(halves, config.init_method, seed + 2 * i, shard_dim=0, **shard)
        output = config.output_layer_init_method
        initialise_expert((fc2,), output, seed + 2 * i + 1, shard_dim=1, **shard)


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
