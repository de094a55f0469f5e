"""The end of a global batch: routers update what balances them, Megatron finalises gradients.

Megatron's schedules call ``config.finalize_model_grads_func(model, num_tokens, …)`` when the last
micro-batch is through. A MoE layer puts :func:`finish_batch` there when it is built; a training
loop of one's own calls the same function. Megatron's own update of the expert bias stacks the
counts of all layers, which fails as soon as two layers have another number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.experts import offload
from megatron_moe.experts.fp8_delayed import DelayedScales, end_delayed_batch
from megatron_moe.mcore.hold import HOLD
from megatron_moe.mcore.pruning import PRUNING
from megatron_moe.route.part import end_global_batch
from megatron_moe.telemetry.counters import routers_of


def install(config: Any) -> None:
    """Put :func:`finish_batch` around whatever finalises the gradients; once for each config."""
    present = config.finalize_model_grads_func
    if not (isinstance(present, partial) and present.func is finish_batch):
        config.finalize_model_grads_func = partial(finish_batch, present)


def finish_batch(finalize: Callable[..., Any] | None, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Update the state of routers and experts from the whole global batch, and finalise.

    Args:
        finalize: What finalises the gradients; None for Megatron's own.
        model: Megatron's list of model chunks.
        args: For ``finalize``.
        kwargs: For ``finalize``.

    Cost: one all-reduce for all routers of the stage with state, over the data-parallel ranks;
        with emulated delayed scaling, one or two of 3 numbers for each expert's linear layer.
    """
    routers = [router for router in routers_of(model) if router.training]
    if finalize is None:
        from megatron.core.distributed import finalize_model_grads

        finalize = finalize_model_grads
    HOLD.next_step(routers)
    offload.end_batch()
    end_batch(routers)
    end_expert_batch(model)
    result = finalize(model, *args, **kwargs)
    PRUNING.end_batch(model)
    HOLD.zero_gradients(model)
    return result


@torch.no_grad()
def end_batch(routers: list[Any]) -> None:
    """Let all routers end a global batch together; every rank of the stage calls it."""
    if not routers:
        return
    parts = [part for router in routers for part in router.parts]
    end_global_batch(parts, routers[0].groups.tp_dp_cp)
    for router in routers:
        router.end_batch()


@torch.no_grad()
def end_expert_batch(model: Any) -> None:
    """Let all experts end a global batch together; every rank of the stage calls it."""
    holders = [m for chunk in model for m in chunk.modules() if hasattr(m, "delayed_scales")]
    scales: list[DelayedScales] = [s for holder in holders for s in holder.delayed_scales()]

    def reduce_max(seen: Tensor) -> None:
        for group in (holders[0].dp_group, holders[0].tp_group):
            if group is not None and group.size() > 1:
                dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)

    end_delayed_batch(scales, reduce_max)
