"""The end of a global batch for 2:4 sparse experts: decay, and exact zeros once masks are frozen.

SR-STE's decay belongs to the final gradient, once for each global batch: for a weight W with mask
M, ``g ← g + λ · (1 − M) ⊙ W``. That is the paper's update; its authors' program adds the same term
in the backward pass, thus once for each micro-batch, where results depend on how many there are.
It is part of the gradient that the optimizer sees (clipped, in the moments), as with the authors.

With frozen masks a gradient of zero is not enough for weights that must stay zero: moments move
them. So what is outside of the mask is put to zero after each step, in whatever the optimizer
steps (the weight, its fp32 copy, or a shard of one of them) and in its state. Optimizers that step
copies of their own, as Megatron's CPU offload does, keep such weights; the product is masked there
all the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from megatron_moe.experts.sparse import sparse_linears


class Pruning:
    """What to do with sparse weights around the next optimizer step; one for the process."""

    def __init__(self) -> None:
        self._hooked = False
        self._frozen = _StandIns([])

    @torch.no_grad()
    def end_batch(self, model: Sequence[Any]) -> None:
        """Add the decay to the final gradients, or clear them where masks are frozen.

        With the distributed optimizer only a shard of a gradient is final and read; the rest may
        be changed.

        Args:
            model: Megatron's list of model chunks; their routers have ended the batch.

        Cost: one pass over the gradients of sparse weights.
        """
        frozen = []
        for chunk in model:
            for linear in sparse_linears(chunk):
                if not linear.training:
                    continue
                if linear.sparsity.frozen and linear.sparsity.applied:
                    frozen.append((linear, chunk))
                    _gradient(linear.weight).masked_fill_(~linear.mask, 0.0)
                elif linear.sparsity.applied:
                    _add_decay(linear, getattr(chunk.config, "grad_scale_func", None))
                linear.sparsity.weight_will_change()
        self._frozen = _StandIns(frozen)
        if frozen and not self._hooked:
            register_optimizer_step_post_hook(self._after)
            self._hooked = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        for stepped in (p for group in optimizer.param_groups for p in group["params"]):
            outside = self._frozen.outside(stepped)
            if outside is None:
                continue
            for value in (stepped, *optimizer.state.get(stepped, {}).values()):
                if isinstance(value, Tensor) and value.shape == stepped.shape:
                    value.masked_fill_(outside, 0)


class _StandIns:
    """Finds the sparse weight, and the part of it, that an optimizer steps.

    Args:
        frozen: Modules with a sparse weight, each with the model chunk it is in.
    """

    def __init__(self, frozen: list[tuple[Any, Any]]) -> None:
        self._known: dict[int, tuple[Any, int]] = {}
        places = ((linear.weight.data_ptr(), linear) for linear, _ in frozen)
        self._memory = sorted(places, key=lambda entry: entry[0])
        for linear, chunk in frozen:
            weight = linear.weight
            self._known[id(weight)] = linear, 0
            main = getattr(weight, "main_param", None)
            if main is not None:
                sharded = getattr(weight, "main_param_sharded", False)
                self._known[id(main)] = linear, _shard_start(weight, chunk) if sharded else 0

    def outside(self, stepped: Tensor) -> Tensor | None:
        """Where ``stepped`` must be zero; None if it is no sparse weight or part of one."""
        linear, start = self._known.get(id(stepped)) or self._by_memory(stepped)
        if linear is None:
            return None
        part = linear.mask.view(-1)[start : start + stepped.numel()]
        return ~part.view(stepped.shape)

    def _by_memory(self, stepped: Tensor) -> tuple[Any, int]:
        """A shard of an fp32 parameter is a view of its memory."""
        address = stepped.data_ptr()
        at = bisect_right(self._memory, address, key=lambda entry: entry[0]) - 1
        if at < 0:
            return None, 0
        first, linear = self._memory[at]
        inside = address - first < linear.weight.nbytes
        return (linear, (address - first) // linear.weight.element_size()) if inside else (None, 0)


def _shard_start(weight: Tensor, chunk: Any) -> int:
    """Which element of a weight is the first of this rank's shard of its master weight.

    A bucket of the distributed optimizer is cut into equal parts, wherever parameters begin.
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        if weight in buffer.param_index_map:
            first, _, index = buffer.param_index_map[weight]
            bucket, group = buffer.buckets[index], buffer.data_parallel_group
            part = bucket.grad_data.numel() // group.size()
            return max(0, bucket.offset + group.rank() * part - first)
    raise RuntimeError(
        "sparse_freeze_iter: the optimizer has a sharded copy of an expert weight that is in no "
        "buffer of Megatron's DistributedDataParallel, so its zeros cannot be kept"
    )


def _add_decay(linear: Any, grad_scale: Any) -> None:
    weight, grad = linear.weight, _gradient(linear.weight)
    factor = torch.tensor(linear.sparsity.decay, device=grad.device)
    if grad_scale is not None:
        factor = grad_scale(factor)
    grad.add_(weight.masked_fill(linear.mask, 0.0).to(grad.dtype) * factor)


def _gradient(parameter: Any) -> Tensor:
    grad = getattr(parameter, "main_grad", None)
    grad = parameter.grad if grad is None else grad
    assert grad is not None, "experts without rows get a zero gradient, never none"
    return grad


PRUNING = Pruning()
