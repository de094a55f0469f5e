"""Computing again in backward instead of keeping, by whichever function the precision needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from torch import Tensor


def recomputed(config: Any, group: Any, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``compute(*inputs)``, of which only the inputs are kept for backward.

    Args:
        config: Megatron's; in FP8 and FP4 Transformer Engine must know that it computes again, or
            its scales would see every tensor twice.
        group: Tensor-parallel group.
        compute: Draws random numbers through Megatron's trackers only.
        inputs: Tensors that carry gradients.
    """
    if config.fp8 or config.fp4:
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(compute, False, tracker, group, *inputs)
    return tensor_parallel.checkpoint(compute, False, *inputs)
