"""Expert load, counted once per decision where it is made, in the router."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def expert_load(model: Any, *, reset: bool = False) -> dict[int, Tensor]:
    """Choices that training tokens of the whole run made of each expert, since the last reset.

    Args:
        model: A module, or Megatron's list of model chunks.
        reset: Start counting anew.

    Returns:
        For each MoE layer of this pipeline stage, by its 1-based number, ``(E,)`` int64 counts
        summed over the ranks that share the stage. Padding is not counted; choices over capacity
        are, since they say where tokens wanted to go.

    Cost: one all-reduce of E integers a layer; all ranks of a stage must call it together.
    """
    chunks: Iterable[Any] = model if isinstance(model, list | tuple) else [model]
    out: dict[int, Tensor] = {}
    for router in (m for chunk in chunks for m in chunk.modules() if hasattr(m, "load")):
        load_E = router.load.clone()
        if router.losses.groups.tp_dp_cp.size() > 1:
            dist.all_reduce(load_E, group=router.losses.groups.tp_dp_cp)
        out[router.layer_number] = load_E.cpu()
        if reset:
            router.load = torch.zeros_like(router.load)
    return out
